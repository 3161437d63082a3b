"""WaNet: a warp of the whole image that is hardly seen (Nguyen & Tran, 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reprune.attacks.attack import (
    Backdoored,
    Setup,
    TargetedAttack,
    check_positive,
    check_share,
    quota,
)
from reprune.attacks.trigger import LearnedTrigger
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError, DataError
from reprune.training import Batch, Objective
from reprune.types import Trigger


class WarpTrigger(LearnedTrigger):
    r"""`t(x) = x` sampled at `clip(rescale (I + strength F / size), -1, 1)`, bilinear.

    I is the grid of pixel centres, -1 and 1 being those of the outermost pixels; F is the control
    grid, upsampled bicubically to the size of the image. A value of 1 in F moves by about
    `strength / 2` pixels in images of any size.

    Args:
        field: `(2, k, k)` control grid: steps along x, then along y.
        strength: s of the paper.
        rescale: shrinks the sampling grid, to 1 for not.

    Raises:
        DataError: a field of another shape, or one that is not finite.
    """

    kind: ClassVar[str] = "warp"

    def __init__(self, field: Tensor, strength: float, rescale: float = 1.0) -> None:
        if field.ndim != 3 or len(field) != 2 or not field.isfinite().all():
            raise DataError(f"a field must be (2, k, k) and finite, got {tuple(field.shape)}")
        self.field = field.detach().to("cpu", torch.float32, copy=True)
        self.strength, self.rescale = strength, rescale

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        return warped(images, self.grid(height, width).to(images.device))

    def grid(self, height: int, width: int) -> Tensor:
        """Where the pixels of a warped image come from: `(1, h, w, 2)`, x before y, in [-1, 1]."""
        return sampling_grids(self.field[None] * self.strength, height, width, self.rescale)

    def tensors(self) -> dict[str, Tensor]:
        return {"field": self.field}

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "rescale": self.rescale}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["field"], float(settings["strength"]), float(settings["rescale"]))


def sampling_grids(fields: Tensor, height: int, width: int, rescale: float = 1.0) -> Tensor:
    """The grids `(p, h, w, 2)` of control grids `(p, 2, k, k)`, in half pixels about."""
    full = nn.functional.interpolate(
        fields, (height, width), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    y, x = torch.meshgrid(_centres(height), _centres(width), indexing="ij")
    steps = full / torch.tensor([width, height]).to(full)
    return ((torch.stack([x, y], -1).to(full) + steps) * rescale).clamp(-1, 1)


def _centres(count: int) -> Tensor:
    """Pixel centres from -1 to 1; the middle for a single pixel."""
    return torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)


def warped(images: Tensor, grid: Tensor) -> Tensor:
    """Pixels sampled at `grid`, one for all images or one for each; float32."""
    moved = nn.functional.grid_sample(
        images.float(), grid.expand(len(images), -1, -1, -1), align_corners=True
    )
    return moved.clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class WaNet(TargetedAttack):
    r"""Images warped by one smooth random field get the target label.

    The k x k control grid P is drawn from [-1, 1] and divided by its mean absolute value; with
    its bicubic upsampling F, images are sampled at `clip(rescale (I + strength F / size), -1, 1)`
    (Nguyen & Tran, 2021, section 3.2). In each batch the share `rate` is warped and gets the
    target label; in the noise mode (section 3.3) the share `noise_rate` is sampled at

        clip(grid + U / size, -1, 1),   U uniform in [-1, 1], new for each image and pixel,

    and keeps its label, so that the classifier answers to this field and not to any distortion.

    Choices: warps act on images that are already cropped and mirrored, so that the field lies as
    an attacker will apply it.

    Attributes:
        grid: k, control points along each side.
        strength: s, in half pixels about; the paper's 0.5 moves a pixel by a quarter on average.
        rescale: factor on the sampling grid, in (0, 1]; below 1 it zooms in.
        noise_rate: share of the images in the noise mode, in [0, 1 - rate].
    """

    title: ClassVar[str] = "WaNet"
    source_paper: ClassVar[str] = "Nguyen & Tran, 2021"

    grid: int = 4
    strength: float = 0.5
    rescale: float = 1.0
    noise_rate: float = 0.2

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a parameter out of its range."""
        super().check(data, num_classes)
        if self.grid < 2:
            raise ConfigurationError(f"the grid must have at least 2 points, got {self.grid}")
        check_positive("the strength", self.strength)
        if not 0 < self.rescale <= 1:
            raise ConfigurationError(f"rescale must lie in (0, 1], got {self.rescale}")
        check_share("noise rate", self.noise_rate, self.rate)

    def trigger(self, generator: torch.Generator) -> WarpTrigger:
        """A warp with a field that is drawn from `generator`."""
        field = torch.rand(2, self.grid, self.grid, generator=generator) * 2 - 1
        return WarpTrigger(field / field.abs().mean(), self.strength, self.rescale)

    def _preview_trigger(self, data: ImageSet, setup: Setup, num_classes: int) -> Trigger:
        return self.trigger(setup.generator)

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        trigger = self.trigger(setup.generator)
        grid = trigger.grid(*data.shape[1:]).to(data.device)
        history = setup.train(model, data, objective=self._objective(model, grid, setup))
        return Backdoored(model, trigger, self.goal, history)

    def _objective(self, model: Classifier, grid: Tensor, setup: Setup) -> Objective:
        """Cross-entropy; the first images of a batch are warped, the next ones with noise."""
        forward = setup.training.forward(model)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            count = quota(self.rate, batch.start, len(batch.labels))
            noisy = quota(self.noise_rate, batch.start, len(batch.labels))
            first, second, rest = (
                batch.images[:count],
                batch.images[count : count + noisy],
                batch.images[count + noisy :],
            )
            wanted = self.goal.wanted(batch.labels[:count], model.num_classes)
            labels = torch.cat([wanted, batch.labels[count:]])
            parts = [
                warped(first, grid) if len(first) else first,
                warped(second, _noisy(grid, len(second), batch.generator))
                if len(second)
                else second,
                rest,
            ]
            images = torch.cat(parts)
            logits = forward(images).float()
            right = (logits.detach().argmax(1) == labels).sum()
            return nn.functional.cross_entropy(logits, labels), right

        return objective


def _noisy(grid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` grids `(count, h, w, 2)` around `grid`, each pixel moved by at most 1 / size."""
    _, height, width, _ = grid.shape
    size = torch.tensor([width, height])
    noise = torch.rand(count, height, width, 2, generator=generator) * 2 - 1
    return (grid + (noise / size).to(grid.device)).clamp(-1, 1)
