"""`training_epoch`: the unit of what methods cost in time."""

from __future__ import annotations

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.training import classification, fit


def training_epoch(model: Classifier, clean: ImageSet) -> None:
    """One training epoch of a copy of `model`: forward, backward and step, in batches of 128."""
    working = model.clone().train()
    parameters = list(working.parameters())
    fit(
        classification(working),
        parameters,
        clean,
        optimizer=torch.optim.SGD(parameters, lr=1e-6, momentum=0.9),
        epochs=1,
        batch_size=128,
        generator=torch.Generator().manual_seed(0),
    )
