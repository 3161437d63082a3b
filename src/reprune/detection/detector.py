"""`Detector`: a model and clean images in, a finding out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet, check_defence_data, check_model
from reprune.defense import Gain, Need
from reprune.detection.inversion import Inverted
from reprune.results import Finding, Trace
from reprune.types import Progress, silent


@dataclass(frozen=True)
class Scanned:
    """What a detector found.

    Attributes:
        finding: the verdict with scores by class; a higher index is more suspicious.
        inverted: recovered triggers, where the method recovers any.
        trace: the evidence on the way: `phases`, `label`, `seconds`.
    """

    finding: Finding
    inverted: Inverted | None = None
    trace: Trace = field(default_factory=Trace)


class Detector(ABC):
    """A method that says whether a model is backdoored, and towards which class.

    Subclasses are frozen dataclasses of hyper-parameters and implement `examine`. There is no
    parameter through which a trigger, an attack or triggered images could enter.

    Attributes:
        source_paper: where it is from.
        needs, gives: what it wants and what it helps with.
    """

    source_paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ("clean labels",)
    gives: ClassVar[tuple[Gain, ...]] = ("detection",)

    @property
    @abstractmethod
    def title(self) -> str:
        """The method's name in words."""

    @property
    def trains(self) -> bool:
        """Whether it trains a copy of the model."""
        return True

    def __call__(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Scanned:
        """Examine `model`; it is never changed.

        Args:
            model: the classifier under suspicion.
            clean: clean images, moved to the model's device.
            generator: all randomness, a CPU generator.
            progress: told after each step.

        Raises:
            DataError: data that cannot be used.
            ModelError: outputs that are not logits, or a model at chance.
            ConfigurationError: a hyper-parameter out of its range.
            ConvergenceError: a phase diverged or did not reach its goal.
        """
        self.check()
        clean = clean.to(model.device)
        check_defence_data(clean, model.num_classes)
        check_model(model, clean, training=self.trains)
        with model.evaluating():
            return self.examine(model, clean, generator=generator, progress=progress)

    @abstractmethod
    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""

    @abstractmethod
    def passes(self, images: int, classes: int) -> float:
        """What the method costs at most, as for `Defense.passes`."""

    @abstractmethod
    def examine(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Scanned:
        """The method itself; arguments are checked and `model` is in evaluation mode."""
