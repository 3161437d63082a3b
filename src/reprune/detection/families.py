"""Families of triggers that an inversion searches, for several classes side by side."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from reprune.attacks.filter_trigger import FilterTrigger, filtered
from reprune.attacks.trigger import Stamp
from reprune.attacks.wanet import WarpTrigger, sampling_grids, warped
from reprune.types import Trigger


class Family(ABC):
    """Triggers of one kind, one for each of k classes.

    Attributes:
        parameters: leaf tensors whose first dimension is k.
        lr: learning rate of Adam on them.
        cost: weight of the size to begin with.
        power: of a trigger's strength that its size grows with.
        farthest: times that a trigger can be exaggerated and still be one of its kind.
    """

    lr: ClassVar[float]
    cost: ClassVar[float]
    power: ClassVar[int] = 2
    farthest: ClassVar[float] = math.inf

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = [p.requires_grad_(True) for p in parameters]

    @abstractmethod
    def apply(self, images: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `(n, c, h, w)` with the triggers `part`: `(p, n, c, h, w)`, and sizes `(p,)`.

        Size is what the family counts: covered pixels, squared change summed over a picture, or
        squared steps averaged over it.
        """

    @abstractmethod
    def trigger(self, values: list[Tensor], index: int) -> Trigger:
        """The trigger of one class as a function, from kept values of `parameters`."""


class Patch(Family):
    """$(1 - m) x + m p$: mask and pattern, counted in covered pixels."""

    lr, cost, power = 0.2, 1e-3, 1

    def __init__(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        c, h, w = shape
        super().__init__(
            torch.full((count, 1, h, w), -2.0), torch.randn(count, c, h, w, generator=generator)
        )

    def apply(self, images: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        mask, pattern = (p[part].sigmoid() for p in self.parameters)
        stamped = images[None] * (1 - mask[:, None]) + (mask * pattern)[:, None]
        return stamped, mask.flatten(1).sum(1)

    def trigger(self, values: list[Tensor], index: int) -> Stamp:
        return Stamp.patch(values[0][index].sigmoid(), values[1][index].sigmoid())


class Additive(Family):
    """$clip(x + d)$: one picture added to all, counted in its squared pixels."""

    lr, cost = 0.02, 1e-2

    def __init__(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__(0.01 * torch.randn(count, *shape, generator=generator))

    def pictures(self, values: Tensor) -> Tensor:
        """From values of the parameter to the pictures `(p, c, h, w)` in (-1, 1)."""
        return values.tanh()

    def apply(self, images: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        added = self.pictures(self.parameters[0][part])
        return (images[None] + added[:, None]).clamp(0, 1), added.square().flatten(1).sum(1)

    def trigger(self, values: list[Tensor], index: int) -> Stamp:
        added = self.pictures(values[0][index : index + 1])[0]
        return Stamp(torch.ones_like(added), added)


class Smooth(Additive):
    """As `Additive`, of a picture with half the resolution: waves, blends, soft shadows.

    Images of class features are full of fine detail; a search that may use it finds nothing else.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        c, h, w = shape
        super().__init__(count, (c, -(-h // 2), -(-w // 2)), generator)
        self._size = (h, w)

    def pictures(self, values: Tensor) -> Tensor:
        return functional.interpolate(values, self._size, mode="bilinear").tanh()


def changed(pictures: Tensor, images: Tensor) -> Tensor:
    """Squared change summed over a picture, on average, `(p,)`: `(p, n, c, h, w)` of images."""
    return (pictures - images).square().flatten(2).sum(2).mean(1)


class Filter(Family):
    """A linear filter and a tint (`FilterTrigger`), counted in the squared change of a picture."""

    lr, cost = 0.005, 1e-2
    SIDE = 5

    def __init__(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        c = shape[0]
        super().__init__(
            0.01 * torch.randn(count, c, c, self.SIDE, self.SIDE, generator=generator),
            0.01 * torch.randn(count, c, generator=generator),
        )

    def apply(self, images: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        kernels, biases = (p[part] for p in self.parameters)
        styled = torch.stack([filtered(images, k, b) for k, b in zip(kernels, biases, strict=True)])
        return styled, changed(styled, images)

    def trigger(self, values: list[Tensor], index: int) -> FilterTrigger:
        return FilterTrigger(values[0][index], values[1][index])


class Warp(Family):
    """A smooth warp of the image (`WarpTrigger`), counted in squared pixels of its steps."""

    lr, cost, farthest = 0.1, 1e-2, 2.0
    SIDE = 6

    def __init__(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__(0.2 * torch.randn(count, 2, self.SIDE, self.SIDE, generator=generator))

    def apply(self, images: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        fields = self.parameters[0][part]
        grids = sampling_grids(2 * fields, *images.shape[2:])
        moved = torch.stack([warped(images, grid[None]) for grid in grids])
        return moved, fields.square().sum(1).flatten(1).mean(1)

    def trigger(self, values: list[Tensor], index: int) -> WarpTrigger:
        return WarpTrigger(values[0][index].nan_to_num(0.0, 0.0, 0.0), 2.0)  # a broken search


class Noise(Family):
    r"""$clip(x + \tanh(g(x)))$: a change that a small network draws from each image.

    Counted in the squared change of a picture. It imitates triggers that differ from image to
    image, such as LIRA's; $g$ is two 5 x 5 convolutions with `HIDDEN` rectified channels between.
    """

    lr, cost = 0.01, 1e-2
    SIDE, HIDDEN = 5, 8

    def __init__(self, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        c, side, hidden = shape[0], self.SIDE, self.HIDDEN
        first = torch.randn(count, hidden, c, side, side, generator=generator)
        second = torch.randn(count, c, hidden, side, side, generator=generator)
        super().__init__(
            first * math.sqrt(2 / (c * side**2)),
            torch.zeros(count, hidden),
            0.1 * second * math.sqrt(1 / (hidden * side**2)),
        )

    def apply(self, images: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        drawn = zip(*(p[part] for p in self.parameters), strict=True)
        noised = torch.stack([noisy(images, *weights) for weights in drawn])
        return noised, changed(noised, images)

    def trigger(self, values: list[Tensor], index: int) -> Trigger:
        first, bias, second = (v[index].nan_to_num(0.0, 0.0, 0.0) for v in values)
        return partial(noisy, first=first, bias=bias, second=second)


def noisy(images: Tensor, first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
    """Pixels `(n, c, h, w)` plus what the network of `Noise` draws from them, clipped to [0, 1]."""
    side = first.shape[-1] // 2
    padded = functional.pad(images - 0.5, (side, side, side, side), mode="reflect")
    hidden = functional.conv2d(padded, first.to(images), bias.to(images)).relu()
    drawn = functional.conv2d(hidden, second.to(images), padding=side)
    return (images + drawn.tanh()).clamp(0, 1)


FamilyName = Literal["patch", "additive", "smooth", "filter", "warp", "noise"]

FAMILIES: dict[
    FamilyName, type[Patch] | type[Additive] | type[Filter] | type[Warp] | type[Noise]
] = {
    "patch": Patch,
    "additive": Additive,
    "smooth": Smooth,
    "filter": Filter,
    "warp": Warp,
    "noise": Noise,
}
"""Families by name."""

ALONE_FAMILIES: tuple[FamilyName, ...] = ("additive", "smooth", "warp")
"""Families of the searches in the model alone, beside the masks and patterns of Neural Cleanse."""
