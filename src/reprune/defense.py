"""`Defense`: a model and clean images in, a repaired model and the evidence out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet, check_defence_data, check_model
from reprune.masks import ChannelMask
from reprune.results import Trace
from reprune.types import Progress, silent


@dataclass(frozen=True)
class Purified:
    """What a defence returns.

    Attributes:
        model: the repaired classifier, a new object in evaluation mode.
        mask: the factors that were baked in; channels at exactly zero are pruned.
        trace: the evidence.
        stages: models on the way, by phase ("unlearned", "recovered").
    """

    model: Classifier
    mask: ChannelMask
    trace: Trace
    stages: Mapping[str, Classifier] = field(default_factory=dict)


class Defense(ABC):
    """A method that repairs a classifier from clean images alone.

    Subclasses are frozen dataclasses of hyper-parameters and implement `purify`. There is no
    parameter through which a trigger, an attack or triggered images could enter.
    """

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
            ConvergenceError: a phase diverged or did not reach its goal.
        """
        clean = clean.to(model.device)
        check_defence_data(clean, model.num_classes)
        check_model(model, clean)
        with model.evaluating():
            return self.purify(model, clean, generator=generator, progress=progress)

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
