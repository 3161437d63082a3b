"""`Filter`: which of these images carry a trigger?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet, check_defence_data, check_model
from reprune.defense import Gain, Need
from reprune.errors import ConfigurationError, DataError
from reprune.results import Trace
from reprune.types import Progress, silent


@dataclass(frozen=True)
class Filtered:
    """What a filter found; tensors on the CPU.

    Attributes:
        scores: `(n,)` float32, one an image; higher is more suspicious, NaN was not decided.
        flagged: `(n,)` bool; an image without a decision is flagged.
        threshold: an image whose score exceeds it is flagged; `None` where the rule is another.
        reasons: the decision in words.
        clean_scores: the scores of the clean images that set the threshold, or empty.
        trace: the evidence on the way: `phases`, `label`, `seconds`.
    """

    scores: Tensor
    flagged: Tensor
    threshold: float | None
    reasons: tuple[str, ...] = ()
    clean_scores: Tensor = field(default_factory=lambda: torch.empty(0))
    trace: Trace = field(default_factory=Trace)


class Filter(ABC):
    """A method that says which images carry a trigger.

    Subclasses are frozen dataclasses of hyper-parameters and implement `judge`. What is examined
    may be poisoned; what sets thresholds is clean.

    Attributes:
        source_paper: where it is from.
        needs, gives: what it wants and what it helps with. With "training data", labels of the
            examined images are used and no clean images are.
        asks_trained: whether the model has to know the classes; one at chance is refused then.
    """

    source_paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    gives: ClassVar[tuple[Gain, ...]] = ("detection",)
    asks_trained: ClassVar[bool] = True

    @property
    @abstractmethod
    def title(self) -> str:
        """The method's name in words."""

    def __call__(
        self,
        model: Classifier,
        images: ImageSet,
        clean: ImageSet | None = None,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Filtered:
        """Score each of `images`; nothing is changed.

        Args:
            model: the classifier that the images are meant for, or were used to train.
            images: the images under suspicion; labels count only with "training data".
            clean: clean labelled images, for the methods that need them.
            generator: all randomness, a CPU generator.
            progress: told after each step.

        Raises:
            DataError: data that cannot be used.
            ModelError: outputs that are not logits, or a model at chance, see `asks_trained`.
            ConfigurationError: a hyper-parameter out of its range; clean images that are missing.
            ConvergenceError: a phase diverged or did not reach its goal.
        """
        self.check()
        if not len(images):
            raise DataError("there are no images to examine")
        images = images.to(model.device)
        if "training data" in self.needs:
            clean = None
            check_defence_data(images, model.num_classes, min_per_class=0)
            check_model(model, images, gradient=False, trained=self.asks_trained)
        elif clean is None:
            raise ConfigurationError(f"{self.title} needs clean images")
        else:
            clean = clean.to(model.device)
            check_defence_data(clean, model.num_classes)
            check_model(model, clean, gradient=False, trained=self.asks_trained)
        with model.evaluating():
            found = self.judge(model, images, clean, generator=generator, progress=progress)
        return replace(
            found,
            scores=found.scores.cpu(),
            flagged=found.flagged.cpu(),
            clean_scores=found.clean_scores.cpu(),
        )

    @abstractmethod
    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""

    @abstractmethod
    def passes(self, images: int, classes: int) -> float:
        """What the method costs at most, as for `Defense.passes`; over the examined images."""

    @abstractmethod
    def judge(
        self,
        model: Classifier,
        images: ImageSet,
        clean: ImageSet | None,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Filtered:
        """The method itself; arguments are checked and `model` is in evaluation mode."""
