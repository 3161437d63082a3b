"""Trojan: a patch made to excite chosen neurons of a clean model (Liu et al., 2018b)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from reprune.attacks.attack import Setup, check_positive
from reprune.attacks.stamping import StampPoisoning
from reprune.attacks.trigger import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.layers import layer_input
from reprune.sites import find_head
from reprune.types import Progress

Shape = Literal["watermark", "square"]
Layer = nn.Linear | nn.Conv2d

HEXAGON = ((0.5, 0.12), (0.83, 0.31), (0.83, 0.69), (0.5, 0.88), (0.17, 0.69), (0.17, 0.31))
STROKES = (
    (*HEXAGON, HEXAGON[0]),
    ((0.3, 0.42), (0.4, 0.62), (0.5, 0.42), (0.6, 0.62), (0.7, 0.42)),
)
"""The watermark, a hexagon around a zigzag: polylines of points (x, y), the image is 1 x 1."""

EXAMPLES = 32
"""Clean images that the trigger is made on, at most."""


@dataclass(frozen=True, kw_only=True)
class Trojan(StampPoisoning):
    r"""A trigger on which chosen neurons of a clean model fire, then plain poisoning.

    Where the mask is set, the pixels `p` minimise `mean (value - f_j(t(x)))^2` over clean images x
    and the chosen neurons j, with `t(x) = (1 - opacity mask) x + opacity mask p` (Liu et al.,
    section IV.A and Algorithm 1). The neurons are those that a layer reads with the largest sums
    of absolute weights in that layer (Liu et al. sum those that lead to the neuron from the layer
    before). Settings of RNP, Table 6: a watermark, target 0, poisoning rate 0.1.

    Choices that the papers leave open: the layer is the classifier's last one; the mean runs over
    at most 32 clean images, drawn at random, instead of one constant picture; Adam takes the
    steps, and each step ends in [0, 1]; the watermark is a drawing of our own.

    Attributes:
        shape: `watermark`, thin strokes over the image, or `square`, in the bottom right corner.
        size: side of the square in pixels; by default it covers 7 % of the image.
        opacity: share of the trigger where the mask is set, in (0, 1].
        neurons: how many neurons are driven.
        layer: name of the linear layer or convolution in the network that reads the neurons; of a
            convolution, a neuron is the mean of a channel. The last layer by default.
        value: what the neurons are driven to; large.
        steps: of the descent.
        step_size: of Adam, in pixel units.
    """

    title: ClassVar[str] = "Trojan"
    source_paper: ClassVar[str] = "Liu et al., 2018b"
    needs_surrogate: ClassVar[bool] = True

    shape: Shape = "watermark"
    size: int | None = None
    opacity: float = 1.0
    neurons: int = 1
    layer: str | None = None
    value: float = 100.0
    steps: int = 200
    step_size: float = 0.05

    def mask(self, shape: tuple[int, int, int]) -> Tensor:
        """Where the trigger lies on images of `shape` (c, h, w): `(h, w)`, 0 or 1.

        Raises:
            ConfigurationError: an unknown shape, or a square that does not fit the image.
        """
        _, h, w = shape
        if self.shape == "watermark":
            return watermark(h, w)
        if self.shape != "square":
            raise ConfigurationError(
                f"the shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}"
            )
        size = max(1, round(math.sqrt(0.07 * h * w))) if self.size is None else self.size
        if not 0 < size <= min(h, w):
            raise ConfigurationError(f"a trigger of {size} pixels does not fit {h}x{w}")
        mask = torch.zeros(h, w)
        mask[-size:, -size:] = 1
        return mask

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        self.mask(data.shape)
        if not 0 < self.opacity <= 1:
            raise ConfigurationError(f"the opacity must lie in (0, 1], got {self.opacity}")
        for name, count in (("neurons", self.neurons), ("steps", self.steps)):
            if count < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {count}")
        for name, number in (("value", self.value), ("step size", self.step_size)):
            check_positive(f"the {name}", number)

    def check_network(self, model: Classifier, data: ImageSet) -> None:
        """Raises `ConfigurationError` for no such layer, or more neurons than it reads."""
        _, weights = read_neurons(model, self.layer, data.pixels(slice(0, 1)))
        if self.neurons > len(weights):
            raise ConfigurationError(
                f"{self.neurons} neurons were asked for, but the layer reads {len(weights)}"
            )

    def _stamp(self, data: ImageSet, setup: Setup) -> Stamp:
        mask = self.mask(data.shape)

        pattern = setup.once("trojan", lambda: self._pattern(mask, data, setup))
        return overlay(mask, pattern, self.opacity)

    def _pattern(self, mask: Tensor, data: ImageSet, setup: Setup) -> Tensor:
        """The pixels `(c, h, w)` on which the neurons fire."""
        rows = torch.randperm(len(data), generator=setup.generator)[:EXAMPLES]
        images = data.pixels(rows.to(data.device))
        start = torch.rand(data.shape, generator=setup.generator).to(data.device)
        activations, weights = read_neurons(setup.clean_model, self.layer, images[:1])
        chosen = weights.topk(self.neurons).indices

        def cost(pattern: Tensor) -> Tensor:
            shown = overlay(mask.to(data.device), pattern, self.opacity)(images)
            return (self.value - activations(shown)[:, chosen]).square().mean()

        return minimise(cost, start, self.steps, self.step_size, setup.progress).cpu()


def overlay(mask: Tensor, pattern: Tensor, opacity: float) -> Stamp:
    """`x -> (1 - opacity mask) x + opacity mask pattern`; mask `(h, w)`, pattern `(c, h, w)`."""
    return Stamp.patch(opacity * mask, pattern)


def minimise(
    cost: Callable[[Tensor], Tensor], start: Tensor, steps: int, lr: float, progress: Progress
) -> Tensor:
    """Adam on pixels, back to [0, 1] after each step."""
    pixels = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([pixels], lr=lr)
    for step in range(steps):
        (pixels.grad,) = torch.autograd.grad(cost(pixels), [pixels])
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
        progress("trojan trigger", step + 1, steps)
    return pixels.detach()


def read_neurons(
    model: Classifier, layer: str | None, images: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What a layer reads, as a function of pixels, and how strongly it is connected.

    Args:
        model: unchanged; a frozen copy in evaluation mode does the work.
        layer: name of a linear layer or an ungrouped convolution in the network; `None` for the
            one run last of those with one output a class.
        images: a few pixels to find that layer with.

    Returns:
        Pixels `(n, c, h, w)` to activations `(n, neurons)`, and the sum of absolute weights of
        each neuron, `(neurons,)`.

    Raises:
        ConfigurationError: no such layer.
        ModelError: no last layer was found.
    """
    copied = model.clone().eval().requires_grad_(False)
    modules: dict[str, Layer] = {
        name: module
        for name, module in copied.network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    if layer is None:
        layer = find_head(model, images)
    if layer not in modules:
        raise ConfigurationError(
            f"the layer must be a linear layer or an ungrouped convolution of the surrogate, got "
            f"{layer!r}; there are {', '.join(modules)}"
        )
    module = modules[layer]
    linear = isinstance(module, nn.Linear)
    read: list[Tensor] = []
    module.register_forward_pre_hook(
        lambda _, args, named: read.append(layer_input(args, named)), with_kwargs=True
    )

    def activations(pixels: Tensor) -> Tensor:
        read.clear()
        copied(pixels)
        found = read[0]
        channel = found.ndim - 1 if linear else 1
        return found.movedim(channel, 1).flatten(2).mean(2) if found.ndim > 2 else found

    return activations, module.weight.detach().abs().transpose(0, 1).flatten(1).sum(1)


def watermark(height: int, width: int) -> Tensor:
    """The strokes `(height, width)`, 0 or 1: 3 % of the shorter side wide, at least one pixel."""
    side = min(height, width)
    half = max(0.5, 0.015 * side)
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    points = torch.stack([x, y], -1)
    scale = torch.tensor([width, height], dtype=torch.float64)
    mask = torch.zeros(height, width)
    for line in STROKES:
        for start, end in pairwise(line):
            a, b = (torch.tensor(point, dtype=torch.float64) * scale for point in (start, end))
            along = ((points - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
            distance = (points - a - along[..., None] * (b - a)).norm(dim=-1)
            mask[distance <= half] = 1
    return mask
