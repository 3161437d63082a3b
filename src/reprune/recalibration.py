"""`recalibrated`: a copy whose batch norms know the activations of clean images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, at_once

COPIES = 4
"""Copies of the images that are seen, all but one augmented."""

BATCH = 256


@torch.no_grad()
def recalibrated(
    model: Classifier,
    data: ImageSet,
    augmentation: Augmentation,
    *,
    generator: torch.Generator,
) -> Classifier:
    """A copy of `model` whose batch norms keep the mean and variance of clean images.

    Those that a model comes with are of the images that it was trained on, triggered ones among
    them, and of the weights that it had then. Nothing but these statistics changes, and without
    batch norms that keep any, or with fewer than two images, nothing does.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization",
    UAI 2018, section 3.2.

    Args:
        model: the classifier; it is not changed.
        data: clean images; labels are not used.
        augmentation: of all copies of the images but the first.
        generator: order and augmentation of the images.
    """
    copy = model.clone().eval()
    norms = batch_norms(copy)
    if len(data) < 2 or not norms:
        return copy
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
        norm.momentum = None  # the mean over all batches
        norm.train()
    size = max(2, at_once(BATCH, data.shape))
    for number in range(COPIES):
        for images, _ in data.batches(size, generator):
            copy(augmentation(images, generator) if number else images)
    for norm, (momentum, count) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, count
        norm.eval()
    return copy


def batch_norms(model: nn.Module) -> list[Any]:
    """The batch norms of a model that keep statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]
