"""Step 1: unlearn the clean task by gradient ascent (RNP, Section 3.2, Eqn. 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError, ConvergenceError, DivergenceError
from reprune.evaluation import fitting_augmentation, predict
from reprune.masks import ChannelMask, bake
from reprune.results import Epoch
from reprune.rnp.phase import Fitted, Level, Phase, cross_entropy, run_phase
from reprune.sites import Site
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class Unlearning(Phase):
    """Settings of unlearning. Without arguments: the defaults of `RNP`, which says why.

    Attributes:
        loss_cap: an image whose cross-entropy exceeds this many times log(classes), the loss of a
            random guess, no longer counts; `None` lets the loss grow without bound.
        stop_accuracy: unlearning ends when accuracy on the defence data is at or below this, in
            [0, 1]; `None` means random guess: at most 2 points above the share of the data's
            largest class, which is what a constant answer gets. A negative value never stops:
            all epochs are run.
        stop_on: "running" is the accuracy of the training batches over an epoch (what the
            released code watches), "evaluated" the accuracy after each step, in evaluation mode,
            at the price of a forward pass over the data a step.
        incorrectly: instead of ascending, descend towards the classes that an unlearned model
            predicts (RNP, Table 13, "learning incorrectly"); the model is unlearned first to get
            them.
        retries: how often to start again, with three times the learning rate where the goal was
            not reached within the epochs and with a third of it after a divergence.
    """

    level: Level = "neuron"
    lr: float = 0.01
    weight_decay: float = 5e-4
    epochs: int = 40
    loss_cap: float | None = 2.0
    stop_accuracy: float | None = None
    stop_on: Literal["running", "evaluated"] = "running"
    incorrectly: bool = False
    retries: int = 2

    def check(self) -> None:
        """Raises ConfigurationError for settings that cannot work."""
        super().check()
        if self.loss_cap is not None and self.loss_cap <= 1:
            raise ConfigurationError(
                "loss_cap counts in losses of a random guess and must exceed 1, "
                f"got {self.loss_cap}"
            )
        if self.stop_on not in ("running", "evaluated"):
            raise ConfigurationError(
                f"stop_on must be 'running' or 'evaluated', got {self.stop_on!r}"
            )


def unlearn(
    model: Classifier,
    data: ImageSet,
    settings: Unlearning,
    sites: Sequence[Site],
    *,
    augmentation: Augmentation,
    generator: torch.Generator,
    progress: Progress,
) -> Fitted:
    r"""Maximise the cross-entropy on clean data: $\max_\theta L(f(x; \theta), y)$.

    At the neuron level all parameters move; at the filter level the factors of `sites` do, and
    they stay in the outcome's `masks` while the model keeps its weights.

    Returns:
        The unlearned model in evaluation mode (at the filter level: with `masks` to apply).

    Raises:
        ConvergenceError: the accuracy did not reach `stop_accuracy` within the epochs, or the
            loss became NaN (`DivergenceError`), in the last of all tries.
    """
    for left in range(settings.retries, -1, -1):
        try:
            return _unlearn(
                model,
                data,
                settings,
                sites,
                augmentation=augmentation,
                generator=generator,
                progress=progress,
            )
        except ConvergenceError as error:
            if not left:
                raise
            factor = 1 / 3 if isinstance(error, DivergenceError) else 3.0
            settings = replace(settings, lr=settings.lr * factor)
    raise ConfigurationError(f"retries must not be negative, got {settings.retries}")


def _unlearn(
    model: Classifier,
    data: ImageSet,
    settings: Unlearning,
    sites: Sequence[Site],
    *,
    augmentation: Augmentation,
    generator: torch.Generator,
    progress: Progress,
) -> Fitted:
    """One try of `unlearn`."""
    floor = settings.stop_accuracy
    if floor is None:
        floor = float(data.labels.bincount().max()) / len(data) + 0.02
    measured = 1.0
    cap = (settings.loss_cap or math.inf) * math.log(model.num_classes)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(logits, labels, reduction="none").clamp(max=cap).mean()

    def stop(epoch: Epoch) -> bool:
        nonlocal measured
        measured = epoch.accuracy
        return measured <= floor

    def stop_step(moved: Classifier, mask: ChannelMask) -> bool:
        nonlocal measured
        current = moved if settings.level == "neuron" else bake(moved, mask)
        logits = predict(current, data)
        if not bool(logits.isfinite().all()):  # NaN answers class 0, which looks like a guess
            raise DivergenceError(
                "unlearning diverged: the outputs are NaN or infinite; lower the learning rate or "
                "set a gradient clipping norm"
            )
        measured = float((logits.argmax(1) == data.labels).float().mean())
        return measured <= floor

    evaluated = settings.stop_on == "evaluated" and floor >= 0
    fitted = run_phase(
        model,
        data,
        settings,
        sites,
        loss,
        name="unlearn",
        augmentation=augmentation,
        generator=generator,
        progress=progress,
        stop=None if evaluated else stop,
        stop_step=stop_step if evaluated else None,
    )
    if measured > floor >= 0:
        raise ConvergenceError(
            f"unlearning did not converge: accuracy on the defence data is {measured:.1%} after "
            f"{settings.epochs} epochs, the goal is {floor:.1%}; raise the number of epochs or "
            "the learning rate, or the stop accuracy"
        )
    logits = predict(unlearned_model(fitted, settings, sites), data)
    if not bool(logits.isfinite().all()):  # the last step may have broken it, unseen by its loss
        raise DivergenceError(
            f"unlearn diverged in epoch {len(fitted.history)}: the outputs are NaN or infinite; "
            "lower the learning rate or set a gradient clipping norm"
        )
    if not settings.incorrectly:
        return fitted
    wrong = logits.argmax(1)
    return run_phase(
        model,
        ImageSet(data.images, wrong, data.class_names),
        settings,
        sites,
        cross_entropy,
        name="learn incorrectly",
        augmentation=augmentation,
        generator=generator,
        progress=progress,
    )


def unlearn_neurons(
    model: Classifier,
    data: ImageSet,
    settings: Unlearning | None = None,
    *,
    generator: torch.Generator,
    progress: Progress,
) -> Fitted:
    """The unlearned model that other methods build on ("NU", RNP, Appendix D).

    All weights are unlearned on all of `data`, cropped and, where the model bears it, mirrored.

    Raises:
        ConfigurationError: unlearning at the filter level, which leaves the weights as they are.
        ConvergenceError: as `unlearn`.
    """
    settings = settings or Unlearning()
    check_unlearning(settings)
    return unlearn(
        model,
        data,
        settings,
        (),
        augmentation=fitting_augmentation(model, data),
        generator=generator,
        progress=progress,
    )


def check_unlearning(settings: Unlearning) -> None:
    """Raises `ConfigurationError` for settings that cannot work, the filter level among them."""
    settings.check()
    if settings.level != "neuron":
        raise ConfigurationError("the unlearned model needs unlearning at the neuron level")


def unlearning_passes(settings: Unlearning, images: int) -> float:
    """Images through the network at most in unlearning and asking for the label, over `images`."""
    steps = images / settings.batch_size + 1
    each = 1 + (steps if settings.stop_on == "evaluated" else 0)
    return (
        (settings.retries + 1) * settings.epochs * each
        + settings.incorrectly * (settings.epochs + 1)
        + 4  # two to see whether mirroring is borne, one for finite outputs, one for the label
    )


def unlearned_model(fitted: Fitted, settings: Unlearning, sites: Sequence[Site]) -> Classifier:
    """The unlearned model as one network, factors baked in."""
    if settings.level == "neuron":
        return fitted.model
    return bake(fitted.model, ChannelMask.over(sites, fitted.masks, shift=settings.shift))


@torch.no_grad()
def weight_change(
    before: Classifier, after: Classifier, sites: Sequence[Site]
) -> tuple[Tensor, ...]:
    """L1 distance that each channel's incoming weights moved; `(channels,)` a site.

    Source: unlearning weight change, Lin et al., NeurIPS 2024.
    """
    changes = []
    for site in sites:
        old, new = (
            torch.as_tensor(model.network.get_submodule(site.layer).weight)
            for model in (before, after)
        )
        changes.append((new - old).flatten(1).abs().sum(1))
    return tuple(changes)
