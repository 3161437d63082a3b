"""Training a copy of a classifier; optional step 4, fine-tuning the pruned one (RNP, Table 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError, DivergenceError
from reprune.masks import bake, masked_call
from reprune.results import Epoch
from reprune.training import Objective, Schedule, classification, fit, one_cycle
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
    tuned, history = tune(
        model,
        data,
        lambda working: classification(
            lambda images: masked_call(working, mask, images, track_buffers=True)
        ),
        settings,
        phase="fine-tune",
        augmentation=augmentation,
        generator=generator,
        progress=progress,
    )
    return bake(tuned, mask), history


def tune(
    model: Classifier,
    data: ImageSet,
    objective: Callable[[Classifier], Objective],
    settings: FineTuning,
    *,
    phase: str,
    schedule: Schedule = one_cycle,
    augmentation: Augmentation | None,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Classifier, tuple[Epoch, ...]]:
    """Minimise `objective(copy of model)` over all weights of the copy; batch norm trains along.

    SGD with momentum 0.9; `schedule` is the factor on the learning rate by step.

    Returns:
        The tuned copy in evaluation mode, and one `Epoch` a pass.

    Raises:
        DivergenceError: the loss, or what training left behind, is NaN or infinite.
    """
    working = model.clone().laid_out().train()
    parameters = list(working.parameters())
    history = fit(
        objective(working),
        parameters,
        data,
        optimizer=torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay
        ),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        generator=generator,
        augment=augmentation,
        schedule=schedule,
        progress=progress,
        phase=phase,
    )
    check_finite(working, model, phase, len(history))
    return working.eval(), tuple(history)


def check_finite(model: nn.Module, before: nn.Module, phase: str, epoch: int) -> None:
    """Raises `DivergenceError` for weights or statistics that became NaN or infinite.

    What was not finite in `before`, as masks of attention are, says nothing.
    """
    usual = before.state_dict()
    if any(_broken(value) and not _broken(usual[k]) for k, value in model.state_dict().items()):
        raise DivergenceError(
            f"{phase} diverged in epoch {epoch}: the weights or running statistics are NaN or "
            "infinite; lower the learning rate"
        )


def _broken(value: object) -> bool:
    """Whether an entry of a `state_dict` is a tensor that is NaN or infinite somewhere."""
    return isinstance(value, Tensor) and not bool(value.isfinite().all())
