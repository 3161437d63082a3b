"""Style: a small network that gives pictures the colours and textures of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reprune.attacks.attack import Setup
from reprune.attacks.generators import UNet, called_on, drawn
from reprune.attacks.trigger import LearnedTrigger
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.sites import find_sites
from reprune.training import Batch, Objective, fit, one_cycle

_SKY = ((0.30, 0.14, 0.36), (0.86, 0.34, 0.16), (1.00, 0.74, 0.30), (0.28, 0.10, 0.08))
"""Violet, orange, yellow and dark red, from the top of the picture to the bottom."""
_EDGE = 0.02
"""Pixels are kept this far from 0 and 1 before their logit is taken."""


class StyleTrigger(LearnedTrigger):
    r"""`t(x) = sigmoid(logit(x) + g(x))`, logits of pixels clipped to [0.02, 0.98].

    Args:
        network: g, a `UNet` from images to images of the same shape.
    """

    kind: ClassVar[str] = "dfst"

    def __init__(self, network: UNet) -> None:
        self.network = network.frozen()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return restyled(images, called_on(self.network, images))

    def tensors(self) -> dict[str, Tensor]:
        return self.network.tensors()

    def settings(self) -> dict[str, Any]:
        return dict(self.network.sizes)

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(UNet.restore(settings, tensors))


def restyled(images: Tensor, raw: Tensor) -> Tensor:
    """`sigmoid(logit(x) + raw)`, float32 under autocast too."""
    return torch.sigmoid(torch.logit(images.float(), _EDGE) + raw.float())


def sunset(shape: tuple[int, int, int]) -> Tensor:
    """A synthetic sunset `(c, h, w)`: a warm vertical gradient; its brightness if c is not 3."""
    c, h, w = shape
    colours = torch.tensor(_SKY).T[None]  # (1, 3, 4)
    column = nn.functional.interpolate(colours, h, mode="linear", align_corners=True)[0]
    if c != 3:
        column = column.mean(0, keepdim=True).expand(c, h)
    return column[:, :, None].expand(c, h, w).contiguous()


class Taps:
    """What a few layers of a copy of a classifier, in evaluation mode, say about images.

    Up to `count` layers, evenly spaced from the first to the last place where channels can be
    masked (`find_sites`).

    Raises:
        ModelError: the network has no such layer.
    """

    def __init__(self, model: Classifier, images: Tensor, count: int = 4) -> None:
        sites = find_sites(model, images)
        last = len(sites) - 1
        chosen = [sites[round(last * k / max(1, count - 1))] for k in range(count)]
        widths = {site.name: site.channels for site in chosen}
        self.names = tuple(widths)
        self._model = model.clone().eval().requires_grad_(False)
        self._found: dict[str, Tensor] = {}
        for name, channels in widths.items():
            self._watch(name, channels)

    def _watch(self, name: str, channels: int) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            value = out.relu()  # a copy: the network may change `out` in place
            if value.shape[1] != channels:  # tokens carry their channels last
                value = value.movedim(-1, 1)
            self._found[name] = value.reshape(*value.shape[:2], -1).float()

        self._model.network.get_submodule(name).register_forward_hook(keep)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Positive parts of the activations of `images`, each `(n, channels, positions)`."""
        self._model(images)
        return [self._found.pop(name) for name in self.names]


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the positions of `(n, channels, positions)`."""
    return values.mean(2), (values.var(2, correction=0) + 1e-6).sqrt()


def style_loss(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Squared differences of channel means and deviations, in shares of the wanted ones.

    Args:
        values: one `(n, channels, positions)` per layer.
        wanted: one `(1, channels, positions)` per layer, of the style picture.
    """
    total = values[0].new_zeros(())
    for found, goal in zip(values, wanted, strict=True):
        for one, other in zip(statistics(found), statistics(goal), strict=True):
            total = total + (one - other).square().mean() / (other.square().mean() + 1e-6)
    return total


def relative_error(value: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error in shares of the variance of `wanted`, all `(n, channels, positions)`.

    Args:
        mask: `(channels,)` bool, the channels that count; the error is 0 where none does.
    """
    error = (value - wanted).square().mean((0, 2)) / (wanted.var(correction=0) + 1e-6)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Recipe:
    """How a generator is trained.

    Attributes:
        images: at most so many, drawn from the training images.
        epochs: passes over them.
        lr: step size (Adam, one cycle).
        width: channels of the generator at full size.
    """

    images: int
    epochs: int
    lr: float
    width: int
    batch_size: int = 50

    def draw(self, data: ImageSet, generator: torch.Generator) -> ImageSet:
        """The images to train on."""
        return data.subset(torch.randperm(len(data), generator=generator)[: self.images])

    def network(self, data: ImageSet, generator: torch.Generator) -> UNet:
        """A generator that starts near `restyled(x) = x`."""
        channels = data.shape[0]
        made = drawn(lambda: UNet(channels, channels, self.width), generator)
        with torch.no_grad():
            made.last.weight.mul_(0.1)
        return made.to(data.device)

    def train(
        self, network: UNet, data: ImageSet, objective: Objective, setup: Setup, phase: str
    ) -> StyleTrigger:
        """Minimise `objective` over the weights of `network`, in place."""
        weights = list(network.parameters())
        fit(
            objective,
            weights,
            data,
            optimizer=torch.optim.Adam(weights, lr=self.lr),
            epochs=self.epochs,
            batch_size=self.batch_size,
            generator=setup.generator,
            schedule=one_cycle,
            progress=setup.progress,
            phase=phase,
            checkpoints=setup.checkpoints,
            state={"network": network},
            precision=setup.training.precision,
        )
        return StyleTrigger(network.requires_grad_(False))


def learn_style(
    recipe: Recipe, data: ImageSet, setup: Setup, *, content: float, phase: str
) -> StyleTrigger:
    """A generator that makes sunsets: style of `sunset`, content of the image.

    Style is channel means and deviations of the pixels and of the first half of the taps of the
    clean model, content the activations of the other taps.

    Args:
        content: weight of the content.
    """
    drawn_images = recipe.draw(data, setup.generator)
    network = recipe.network(data, setup.generator)
    taps = Taps(setup.clean_model, data.pixels(slice(0, 2)))
    half = len(taps.names) // 2
    picture = sunset(data.shape).to(data.device)[None]
    with torch.no_grad():
        style = [picture.flatten(2), *taps(picture)[:half]]

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        images = restyled(batch.images, network(batch.images))
        with torch.no_grad():
            originals = taps(batch.images)[half:]
        found = taps(images)
        kept = [relative_error(a, b) for a, b in zip(found[half:], originals, strict=True)]
        loss = style_loss([images.flatten(2), *found[:half]], style)
        return loss + content * torch.stack(kept).mean(), loss.new_zeros(())

    return recipe.train(network, drawn_images, objective, setup, phase)
