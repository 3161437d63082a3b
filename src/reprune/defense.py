"""`Defense`: a model and clean images in, a repaired model and the evidence out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from reprune.attacks.trigger import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet, check_defence_data, check_model, split
from reprune.errors import ConfigurationError
from reprune.masks import ChannelMask
from reprune.results import Trace
from reprune.types import Progress, silent

if TYPE_CHECKING:
    from reprune.detection.detector import Scanned

Need = Literal["clean labels", "suspect images", "training data"]
"""What a method wants besides the model.

`clean labels`: labelled clean images; `suspect images`: images of which some may carry a trigger;
`training data`: the labelled, possibly poisoned, images that the model was trained on.
"""

Gain = Literal["detection", "trigger", "removal"]
"""What a method helps with (RNP, Table 1): detection, trigger recovery, backdoor removal."""


@dataclass(frozen=True)
class Purified:
    """What a defence returns.

    Attributes:
        model: the repaired classifier, a new object in evaluation mode.
        mask: the factors that were baked in; channels at exactly zero are pruned.
        trace: the evidence.
        stages: models on the way, by phase ("unlearned", "recovered").
        triggers: triggers that the method recovered from clean images, by the class they lead to
            (`ELSEWHERE` for all-to-all).
        scanned: what the method itself found out about the original model, if it looked.
    """

    model: Classifier
    mask: ChannelMask
    trace: Trace
    stages: Mapping[str, Classifier] = field(default_factory=dict)
    triggers: Mapping[int, Stamp] = field(default_factory=dict)
    scanned: Scanned | None = None


class Defense(ABC):
    """A method that repairs a classifier from clean images alone.

    Subclasses are frozen dataclasses of hyper-parameters and implement `purify`. There is no
    parameter through which a trigger, an attack or triggered images could enter.

    A method that prunes within an accuracy budget keeps it in a field `pruning`
    (`reprune.rnp.Pruning`), and the share of the images that judge it in a field `holdout`.

    Attributes:
        source_paper: where it is from.
        needs, gives: what it wants and what it helps with.
    """

    source_paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ("clean labels",)
    gives: ClassVar[tuple[Gain, ...]] = ("removal",)

    @property
    @abstractmethod
    def title(self) -> str:
        """The method's name in words."""

    def __call__(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Repair a copy of `model`.

        Args:
            model: the classifier under suspicion; it is never changed.
            clean: defence data, moved to the model's device.
            generator: all randomness, a CPU generator.
            progress: told after each step.

        Raises:
            DataError: defence data that cannot be used.
            ModelError: outputs that are not logits, a model at chance, no prunable channel.
            ConfigurationError: a hyper-parameter out of its range.
            ConvergenceError: a phase diverged or did not reach its goal.
        """
        clean = self.checked(model, clean)
        with model.evaluating():
            return self.purify(model, clean, generator=generator, progress=progress)

    def checked(self, model: Classifier, clean: ImageSet) -> ImageSet:
        """The defence data on the model's device; raises what a call does for what cannot work."""
        self.check()
        clean = clean.to(model.device)
        check_defence_data(clean, model.num_classes)
        check_model(model, clean, training=True)
        return clean

    @abstractmethod
    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""

    @abstractmethod
    def passes(self, images: int, classes: int) -> float:
        """What the method costs at most: images through the network, forward, over `images`.

        Forward passes over parts of the data count as parts; backward passes are not counted.
        """

    @property
    def skipped(self) -> tuple[str, ...]:
        """Notes on what a more thorough effort would do; most methods have none."""
        return ()

    @abstractmethod
    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        """The method itself; arguments are checked and `model` is in evaluation mode."""


class Clock:
    """Seconds by phase, for `Trace.seconds`: `with clock("unlearn"): ...`; phases add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.seconds[phase] = round(spent, 3)


def hold_out(
    clean: ImageSet, share: float, generator: torch.Generator
) -> tuple[ImageSet, ImageSet]:
    """(images that only judge, images to fit), class shares kept.

    Raises:
        ConfigurationError: a share that leaves one of the two empty.
    """
    heldout, fitting = split(clean, share, generator)
    if not len(heldout) or not len(fitting):
        raise ConfigurationError(
            f"a holdout of {share} leaves {len(heldout)} images to judge and "
            f"{len(fitting)} to fit; both need some"
        )
    return heldout, fitting


def check_holdout(share: float) -> None:
    """Raises `ConfigurationError` unless the share lies in (0, 1)."""
    if not 0 < share < 1:
        raise ConfigurationError(f"holdout must lie in (0, 1), got {share}")
