"""The penultimate features of a data set, class by class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reprune.attacks.features import Features
from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once
from reprune.precision import autocast
from reprune.types import Progress

BATCH = 512
TRACED = 2
"""Images that the last layer is found with."""


@torch.no_grad()
def penultimate(model: Classifier, data: ImageSet, progress: Progress) -> Tensor:
    """What the last layer reads: `(n, width)` float32, in evaluation mode.

    Raises:
        ModelError: a network without a linear or convolutional last layer.
    """
    read = Features(model, data.pixels(slice(0, TRACED)))
    size = at_once(BATCH, data.shape)
    total, parts = len(data.batch_sizes(size)), []
    with model.evaluating():
        for done, (images, _) in enumerate(data.batches(size), 1):
            with autocast(data.device):
                found, _ = read(images)
            parts.append(found.float())
            progress("features", done, total)
    return torch.cat(parts)


def by_class(features: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(class, its rows) for each class that has images, without rows that are NaN or infinite."""
    finite = features.isfinite().all(1)
    for label in sorted(set(labels.tolist())):
        yield label, ((labels == label) & finite).nonzero().flatten()


def principal(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors `(width, count)` of `(n, width)`, and singular values.

    From the eigenvectors of the smaller Gram matrix; float64 in, float64 out.
    """
    rows, width = centred.shape
    if width <= rows:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        return vectors, values.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values = values.flip(0)[:count].clamp_min(0).sqrt()
    right = centred.T @ vectors.flip(1)[:, :count]
    return right / right.norm(dim=0).clamp_min(1e-300), values
