"""`UnlearnedLabel`: the class that a model falls back to when its clean task is unlearned (NU)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock
from reprune.detection.detector import Detector, Scanned
from reprune.errors import ConfigurationError, ConvergenceError
from reprune.results import BackdoorLabel, ClassScore, Epoch, Finding, Trace
from reprune.rnp import (
    RNP,
    Unlearning,
    backdoor_label,
    check_unlearning,
    unlearn_neurons,
    unlearning_passes,
)
from reprune.rnp.label import MIN_MARGIN, MIN_SHARE
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class UnlearnedLabel(Detector):
    r"""Unlearn the clean task, look which class the unlearned model answers.

    $$y_t = \arg\max_k |\{x : f(x; \hat\theta) = k\}|, \qquad
      \hat\theta = \arg\max_\theta L(f(x; \theta), y)$$

    The score of a class is its share of the predictions, in [0, 1]. A clean model collapses to one
    class too, so a favourite names the likely target of a model that is backdoored and does not
    prove that it is: the verdict is "undecided" with the label in `Scanned.trace.label` and in the
    reasons, unless `accuse` is set. It is never "clean".

    Source: Li et al., "Reconstructive Neuron Pruning", ICML 2023, Algorithm 1 and Appendix D.3
    (Table 16, "NU"). Several runs that must agree, and the thresholds, are choices of this package.

    Attributes:
        unlearning: how a model is unlearned; at the neuron level.
        runs: unlearned models, each with its own random order; all must agree.
        min_share: smallest share of the favourite, in [0, 1].
        min_margin: smallest lead over the runner-up, in [0, 1].
        accuse: call a model with a clear favourite backdoored, as the paper does.
    """

    title: ClassVar[str] = "Label of the unlearned model"
    source_paper: ClassVar[str] = "Li et al., ICML 2023"

    unlearning: Unlearning = field(default_factory=Unlearning)
    runs: int = 3
    min_share: float = MIN_SHARE
    min_margin: float = MIN_MARGIN
    accuse: bool = False

    @classmethod
    def paper(cls) -> UnlearnedLabel:
        """One run with the paper's unlearning; the favourite, however narrow, is the target."""
        unlearning = RNP.paper().unlearning or Unlearning()
        return cls(unlearning=unlearning, runs=1, min_share=0.0, min_margin=0.0, accuse=True)

    def check(self) -> None:
        check_unlearning(self.unlearning)
        if self.runs < 1:
            raise ConfigurationError(f"runs must be at least 1, got {self.runs}")
        for name in ("min_share", "min_margin"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def passes(self, images: int, classes: int) -> float:
        return 1 + self.runs * unlearning_passes(self.unlearning, images)

    def examine(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Scanned:
        clock = Clock()
        with clock("unlearn"):
            _, phases, label = unlearned(
                model,
                clean,
                self.unlearning,
                runs=self.runs,
                min_share=self.min_share,
                min_margin=self.min_margin,
                generator=generator,
                progress=progress,
            )
        trace = Trace(phases=phases, label=label, seconds=clock.seconds)
        return Scanned(self.judge(label), trace=trace)

    def judge(self, label: BackdoorLabel) -> Finding:
        """The verdict on the favourite of the unlearned models."""
        total = sum(label.histogram)
        scores = tuple(
            ClassScore(k, None, count / total, 0.0) for k, count in enumerate(label.histogram)
        )
        if label.label is None:
            return Finding("undecided", (label.reason,), None, scores)
        if self.accuse:
            return Finding("backdoored", (label.reason,), label.label, scores)
        reasons = (
            label.reason,
            f"if the model is backdoored, class {label.label} is the likely target; a favourite "
            "class alone proves no backdoor",
        )
        return Finding("undecided", reasons, None, scores)


def unlearned(
    model: Classifier,
    clean: ImageSet,
    settings: Unlearning,
    *,
    runs: int = 1,
    min_share: float = MIN_SHARE,
    min_margin: float = MIN_MARGIN,
    generator: torch.Generator,
    progress: Progress,
    failures: list[str] | None = None,
) -> tuple[list[Classifier], dict[str, tuple[Epoch, ...]], BackdoorLabel]:
    """(unlearned models, their epochs by phase, their label); phases are numbered from two runs on.

    Args:
        failures: where runs that fail are told, as long as one succeeds; without it each has to.

    Raises:
        ConvergenceError: as `unlearn_neurons`.
    """
    models: list[Classifier] = []
    phases: dict[str, tuple[Epoch, ...]] = {}
    for run in range(1, runs + 1):
        ending = "" if runs == 1 else f" {run}"
        told = progress if runs == 1 else _numbered(progress, ending)
        try:
            fitted = unlearn_neurons(model, clean, settings, generator=generator, progress=told)
        except ConvergenceError as error:
            if failures is None or (run == runs and not models):
                raise
            failures.append(f"copy{ending}: {error}")
            continue
        models.append(fitted.model)
        phases[fitted.name + ending] = fitted.history
    label = backdoor_label(models, clean, min_share=min_share, min_margin=min_margin)
    return models, phases, label


def _numbered(progress: Progress, ending: str) -> Progress:
    def told(phase: str, done: int, total: int, /, **figures: float) -> None:
        progress(phase + ending, done, total, **figures)

    return told
