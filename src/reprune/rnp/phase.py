"""What unlearning and recovering share: an optimiser over all weights, or over channel masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError
from reprune.masks import ChannelMask, masked_call
from reprune.results import Epoch
from reprune.sites import Site
from reprune.training import Loss, classification, fit
from reprune.types import Progress

Level = Literal["neuron", "filter"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Settings of one optimisation, shared by `Unlearning` and `Recovering`.

    Attributes:
        level: "neuron" moves all parameters, "filter" only one factor a channel.
        optimizer: "sgd" or "adam".
        lr: learning rate.
        momentum: of SGD; ignored by Adam.
        weight_decay: L2 penalty.
        milestones: epochs after which the learning rate is divided by ten.
        epochs: passes over the defence data at most.
        batch_size: images a step.
        batch_norm: "train" normalises by batch statistics and lets the running ones move, "eval"
            uses the running ones; dropout and stochastic depth follow this mode.
        loss_scale: factor on the loss (the released code calls it alpha).
        clip_norm: largest L2 norm of the gradient, applied after `backward`.
        augment: crop and mirror augmentation on or off.
        shift: at the filter level, let the factor act on the bias (beta) as well as the scale.
    """

    level: Level
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    epochs: int = 20
    batch_size: int = 128
    batch_norm: Literal["train", "eval"] = "train"
    loss_scale: float = 1.0
    clip_norm: float | None = None
    augment: bool = True
    shift: bool = False

    def check(self) -> None:
        """Raises ConfigurationError for settings that cannot work."""
        for name in ("lr", "epochs", "batch_size", "loss_scale"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, known in (
            ("level", ("neuron", "filter")),
            ("optimizer", ("sgd", "adam")),
            ("batch_norm", ("train", "eval")),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name} must be one of {known}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Fitted:
    """A phase's outcome: the moved model, the factors per site, their unclipped course, its name.

    `excess[i]` holds, per channel of site i, the sum of what clipping to [0, 1] cut off: below
    zero where the factor kept pushing past zero. It orders channels whose factor is exactly zero.
    """

    model: Classifier
    masks: tuple[Tensor, ...]
    excess: tuple[Tensor, ...]
    history: tuple[Epoch, ...]
    name: str


def run_phase(
    model: Classifier,
    data: ImageSet,
    settings: Phase,
    sites: Sequence[Site],
    loss: Loss,
    *,
    name: str,
    augmentation: Augmentation,
    generator: torch.Generator,
    progress: Progress,
    start: Sequence[Tensor] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
    stop_step: Callable[[Classifier, ChannelMask], bool] | None = None,
) -> Fitted:
    """Minimise `loss` at the level asked for, on a copy of `model`.

    Args:
        start: factors to start from; ones without it. At the neuron level they stay fixed while
            the weights move under them.
        stop: told each epoch; true ends the phase.
        stop_step: told after each step with the model and the mask so far; true ends the phase.
    """
    settings.check()
    working = model.clone().laid_out()
    working.train(settings.batch_norm == "train")
    device = data.device
    masks = [
        (torch.ones(site.channels) if start is None else start[i].detach().clone()).to(device)
        for i, site in enumerate(sites)
    ]
    excess = [torch.zeros_like(mask) for mask in masks]
    if settings.level == "filter":
        working.requires_grad_(False)
        parameters = [mask.requires_grad_(True) for mask in masks]
    else:
        parameters = list(working.parameters())
    mask = ChannelMask.over(sites, masks, shift=settings.shift)

    def forward(images: Tensor) -> Tensor:
        if settings.level == "neuron" and start is None:
            logits: Tensor = working(images)
            return logits
        return masked_call(working, mask, images, track_buffers=True)

    @torch.no_grad()
    def after_step() -> bool:
        if settings.level == "filter":
            for factor, over in zip(masks, excess, strict=True):
                clipped = factor.clamp(0, 1)
                over += factor - clipped
                factor.copy_(clipped)
        return stop_step is not None and stop_step(working, mask)

    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    else:
        optimizer = torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)

    steps = len(data.batch_sizes(settings.batch_size))
    history = fit(
        classification(forward, lambda logits, labels: settings.loss_scale * loss(logits, labels)),
        parameters,
        data,
        optimizer=optimizer,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        generator=generator,
        augment=augmentation if settings.augment else None,
        schedule=lambda step, _: 0.1 ** sum(step >= m * steps for m in settings.milestones),
        clip_norm=settings.clip_norm,
        after_step=after_step,
        stop=stop,
        progress=progress,
        phase=name,
    )
    working.eval().requires_grad_(True)
    return Fitted(
        working,
        tuple(factor.detach() for factor in masks),
        tuple(excess),
        tuple(history),
        name,
    )


cross_entropy: Loss = nn.functional.cross_entropy
