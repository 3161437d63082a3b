"""`Attack`: what every attack is, and what it is given and returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.goal import Goal
from reprune.checkpoints import Checkpoints, Stateful
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError, DataError
from reprune.results import Epoch
from reprune.training import Objective, Training
from reprune.types import Progress, Trigger, silent


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an attack is given besides the model and the images.

    Attributes:
        training: how the classifier is trained.
        generator: all randomness.
        surrogate: a clean trained classifier, for attacks that are made against one; never changed.
        progress: told after each step.
        checkpoints: where a long run is kept.
    """

    generator: torch.Generator
    training: Training = field(default_factory=Training)
    surrogate: Classifier | None = None
    progress: Progress = silent
    checkpoints: Checkpoints | None = None

    def train(
        self,
        model: Classifier,
        data: ImageSet,
        *,
        objective: Objective | None = None,
        after_step: Callable[[], bool] | None = None,
        phase: str = "train",
        epochs: int | None = None,
        state: Mapping[str, Stateful] | None = None,
        evaluating: bool = False,
    ) -> tuple[Epoch, ...]:
        """`Training.run` on `model` in place, for `epochs` if that is given."""
        training = self.training if epochs is None else replace(self.training, epochs=epochs)
        return training.run(
            model,
            data,
            objective=objective,
            after_step=after_step,
            phase=phase,
            state=state,
            evaluating=evaluating,
            generator=self.generator,
            progress=self.progress,
            checkpoints=self.checkpoints,
        )

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, kept in the checkpoints if there are any."""
        if self.checkpoints is None:
            return compute()
        return self.checkpoints.once(name, compute, self.generator)

    @property
    def clean_model(self) -> Classifier:
        """The surrogate; only for attacks with `needs_surrogate`."""
        assert self.surrogate is not None  # checked by the public entries
        return self.surrogate


@dataclass(frozen=True)
class Backdoored:
    """What an attack returns.

    Attributes:
        model: the classifier in evaluation mode; the one handed in is unchanged.
        trigger: applied to pixels; `None` for a clean model.
        goal: what the trigger asks for; `None` for a clean model.
        history: one entry an epoch of training.
        poisoned: the poisoned rows, where the attack poisons a fixed set of them.
    """

    model: Classifier
    trigger: Trigger | None
    goal: Goal | None
    history: tuple[Epoch, ...] = ()
    poisoned: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A way to make a backdoored classifier. Subclasses are frozen dataclasses of its parameters.

    `attack(model, data, setup)` trains a copy of `model`: a randomly initialised one (the regime
    `scratch`) or a trained clean one (the regime `implant`).

    Attributes:
        title: the field's name of the attack.
        source_paper: the publication.
        clean_label: whether poisoned images keep their true label.
        needs_surrogate: whether it is made against a trained clean classifier.
        implants_only: whether it starts from that classifier whatever model is handed in.
    """

    title: ClassVar[str]
    source_paper: ClassVar[str]
    clean_label: ClassVar[bool] = False
    needs_surrogate: ClassVar[bool] = False
    implants_only: ClassVar[bool] = False

    @property
    @abstractmethod
    def goal(self) -> Goal | None:
        """What the trigger asks for; `None` for a clean model."""

    @abstractmethod
    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        """Train `model`, a copy, in place. For authors of attacks; everything is checked."""

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Whether the attack can be carried out on these training images.

        Raises:
            ConfigurationError: a parameter out of its range, or one that does not fit the images.
            DataError: no images, or labels outside the classes.
        """
        if not len(data):
            raise DataError("the training set holds no images")
        if int(data.labels.min()) < 0 or int(data.labels.max()) >= num_classes:
            raise DataError(
                f"labels must lie in 0..{num_classes - 1}, got {int(data.labels.min())} to "
                f"{int(data.labels.max())}"
            )

    def __call__(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        """Train a backdoored copy of `model` on `data`.

        Args:
            model: where training starts; its weights, mode and hooks are left as they are.
            data: clean labelled training images on the model's device.
            setup: training settings, randomness, surrogate, progress, checkpoints.

        Raises:
            ConfigurationError: parameters that do not fit the images, or no surrogate where one is
                needed; before any training.
            DivergenceError: the training diverged.
        """
        setup.training.check()
        self.check(data, model.num_classes)
        self._check_surrogate(setup.surrogate, data)
        return self._train(model.clone(), data, setup)

    def preview_trigger(
        self,
        data: ImageSet,
        generator: torch.Generator,
        *,
        num_classes: int,
        surrogate: Classifier | None = None,
        progress: Progress = silent,
    ) -> Trigger:
        """The trigger without a training, where the attack allows it.

        Args:
            data: a few clean labelled images.
            generator, surrogate, progress: as in `Setup`.
            num_classes: classes of the model.

        Raises:
            ConfigurationError: there is no trigger, it is learned together with the classifier,
                parameters that do not fit, or no surrogate where one is needed.
        """
        if isinstance(self, TargetedAttack) and 0 < self.rate < 1 / max(1, len(data)):
            return replace(self, rate=1 / len(data)).preview_trigger(
                data,
                generator,
                num_classes=num_classes,
                surrogate=surrogate,
                progress=progress,
            )
        self.check(data, num_classes)
        self._check_surrogate(surrogate, data)
        setup = Setup(generator=generator, surrogate=surrogate, progress=progress)
        return self._preview_trigger(data, setup, num_classes)

    def _preview_trigger(self, data: ImageSet, setup: Setup, num_classes: int) -> Trigger:
        """For authors: the trigger, if it does not depend on the training."""
        if self.goal is None:
            raise ConfigurationError(f"{self.title} has no trigger")
        raise ConfigurationError(
            f"the trigger of {self.title} is learned together with the classifier; "
            "draw it from a model that was made: --trigger FOLDER or zoo:NAME"
        )

    @property
    def wants_surrogate(self) -> bool:
        """Whether the attack with these parameters is made against a trained clean classifier."""
        return self.needs_surrogate

    def check_network(self, model: Classifier, data: ImageSet) -> None:
        """Whether the attack can be made against classifiers of this architecture.

        Raises:
            ConfigurationError: a layer or a size that `model` does not have.
        """
        return

    def _check_surrogate(self, surrogate: Classifier | None, data: ImageSet) -> None:
        if surrogate is not None and self.wants_surrogate:
            self.check_network(surrogate, data)
        if self.wants_surrogate and surrogate is None:
            raise ConfigurationError(
                f"{self.title} is made against a trained clean classifier: give one as surrogate "
                "(--clean-model)"
            )


def check_class(name: str, label: int, num_classes: int) -> None:
    """Raises `ConfigurationError` unless `label` is a class index."""
    if not 0 <= label < num_classes:
        raise ConfigurationError(
            f"the {name} must be a class index in 0..{num_classes - 1}, got {label}"
        )


def check_rate(name: str, rate: float, images: int, *, kind: str = "images") -> int:
    """How many of `images` that is, at least one.

    Raises:
        ConfigurationError: a rate outside (0, 1], or one that asks for no image.
    """
    if not (math.isfinite(rate) and 0 < rate <= 1):
        raise ConfigurationError(f"the {name} must lie in (0, 1], got {rate}")
    count = round(rate * images)
    if count == 0:
        raise ConfigurationError(
            f"a {name} of {rate} poisons none of {images} {kind}; raise the rate"
        )
    return count


def check_positive(name: str, value: float) -> None:
    """Raises `ConfigurationError` unless `value` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name} must be positive, got {value}")


def check_share(name: str, share: float, rate: float) -> None:
    """Raises `ConfigurationError` unless `share` of the images is left besides `rate` of them."""
    if not 0 <= share <= 1 - rate + 1e-9:
        raise ConfigurationError(
            f"the {name} must lie in [0, {1 - rate:.4g}], what a poisoning rate of {rate} leaves, "
            f"got {share}"
        )


def quota(rate: float, start: int, count: int) -> int:
    """How many of the rows `start .. start + count` of an epoch are poisoned.

    Over an epoch of n rows these add up to `round(rate * n)` exactly, whatever the batches.
    """
    return round(rate * (start + count)) - round(rate * start)


@dataclass(frozen=True, kw_only=True)
class TargetedAttack(Attack):
    """An attack with a target class and a poisoning rate.

    Attributes:
        target: class that the trigger asks for.
        rate: share of all training images that are poisoned, in (0, 1].
    """

    target: int = 0
    rate: float = 0.1

    @property
    def goal(self) -> Goal:
        return Goal(self.target)

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a target or rate that does not fit the images."""
        super().check(data, num_classes)
        check_class("target", self.target, num_classes)
        count = check_rate("poisoning rate", self.rate, len(data))
        if self.clean_label:
            available = int((data.labels == self.target).sum())
            if count > available:
                raise ConfigurationError(
                    f"a poisoning rate of {self.rate} asks for {count} of {len(data)} images, but "
                    f"{self.title} poisons only images of the target class {self.target}, of which "
                    f"there are {available}; the rate can be at most {available / len(data):.4g}"
                )
