"""Seeded draws and splits of an `ImageSet`."""

from __future__ import annotations

import torch
from torch import Tensor

from reprune.data.images import ImageSet
from reprune.errors import ConfigurationError


def _stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which every prefix holds the classes as evenly as they allow."""
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        members = shuffled[labels[shuffled] == label]
        jitter = torch.rand((), generator=generator).double()
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + jitter) / len(members)
    return rank.argsort(stable=True)


def take(data: ImageSet, size: int, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """`size` images (all, if there are fewer), class shares kept as in `data`, and the others.

    With one state of `generator`, a smaller draw is a prefix of a larger one.

    Raises:
        ConfigurationError: a size below 1.
    """
    if size < 1:
        raise ConfigurationError(f"the number of images to draw must be at least 1, got {size}")
    order = _stratified_order(data.labels, generator)
    return data.subset(order[:size]), data.subset(order[size:])


def draw(data: ImageSet, size: int, generator: torch.Generator) -> ImageSet:
    """The first part of `take`."""
    return take(data, size, generator)[0]


def split(data: ImageSet, fraction: float, generator: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """Two disjoint parts, the first with `round(fraction * n)` images, class shares kept.

    Raises:
        ConfigurationError: a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ConfigurationError(f"the fraction to split off must lie in [0, 1], got {fraction}")
    order = _stratified_order(data.labels, generator)
    cut = round(len(data) * fraction)
    return data.subset(order[:cut]), data.subset(order[cut:])
