"""Seeded draws and splits of an `ImageSet`."""

from __future__ import annotations

import torch
from torch import Tensor

from reprune.data.images import ImageSet


def _stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which every prefix holds the classes as evenly as they allow."""
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.empty(len(labels))
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        jitter = torch.rand((), generator=generator)
        rank[members] = (torch.arange(len(members)) + jitter) / len(members)
    return rank.argsort(stable=True)


def draw(data: ImageSet, size: int, generator: torch.Generator) -> ImageSet:
    """`size` images (all, if there are fewer), class shares kept as in `data`."""
    return data.subset(_stratified_order(data.labels, generator)[:size])


def split(
    data: ImageSet, fraction: float, generator: torch.Generator
) -> tuple[ImageSet, ImageSet]:
    """Two disjoint parts, the first with `fraction` of the images, class shares kept."""
    order = _stratified_order(data.labels, generator)
    cut = round(len(data) * fraction)
    return data.subset(order[:cut]), data.subset(order[cut:])
