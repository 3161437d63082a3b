"""Optional step 4: fine-tune the pruned model on the clean images (RNP, Table 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError
from reprune.masks import bake, masked_call
from reprune.results import Epoch
from reprune.training import classification, fit, one_cycle
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Settings of fine-tuning: SGD with momentum 0.9 on a one-cycle schedule.

    Attributes:
        lr: peak learning rate.
        epochs: passes over the defence data.
        batch_size: images a step.
        weight_decay: L2 penalty.
    """

    lr: float = 0.01
    epochs: int = 20
    batch_size: int = 64
    weight_decay: float = 5e-4

    def check(self) -> None:
        """Raises ConfigurationError for settings that cannot work."""
        if self.lr <= 0 or self.epochs < 1 or self.batch_size < 1 or self.weight_decay < 0:
            raise ConfigurationError(
                f"lr, epochs and batch_size must be positive, weight_decay not negative, got {self}"
            )


def finetune(
    model: Classifier,
    mask: Mapping[str, Tensor],
    data: ImageSet,
    settings: FineTuning,
    *,
    augmentation: Augmentation,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Classifier, tuple[Epoch, ...]]:
    """Minimise the cross-entropy over all weights while pruned channels stay at zero.

    Returns:
        The tuned copy with `mask` baked in, and one `Epoch` a pass.

    Raises:
        ConfigurationError: a setting that is not positive.
        ConvergenceError: the loss became NaN.
    """
    settings.check()
    working = model.clone().to(memory_format=torch.channels_last).train()
    parameters = list(working.parameters())
    history = fit(
        classification(lambda images: masked_call(working, mask, images, track_buffers=True)),
        parameters,
        data,
        optimizer=torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay
        ),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        generator=generator,
        augment=augmentation,
        schedule=one_cycle,
        progress=progress,
        phase="fine-tune",
    )
    return bake(working, mask), tuple(history)
