"""Attacks that take the poisoned images of another one and train on them in their own way."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import PlainSerializer

from reprune.attacks.attack import Attack, Backdoored, Setup
from reprune.attacks.goal import Goal
from reprune.attacks.poisoning import Poisoned, PoisoningAttack
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.results import Epoch, to_json
from reprune.types import Trigger


def _described(base: PoisoningAttack | str) -> Any:
    """A base as plain data: its name, or all its parameters."""
    return base if isinstance(base, str) else {"attack": base.title, **to_json(base)}


@dataclass(frozen=True, kw_only=True)
class WrappingAttack(Attack):
    """The poisoned images of `base` under another training.

    Attributes:
        base: an attack that only changes training images, or its name: then with its defaults.
        target: class that the trigger asks for; that of `base` by default.
        rate: share of all training images that are poisoned; that of `base` by default.
    """

    base: Annotated[PoisoningAttack | str, PlainSerializer(_described)] = "badnets"
    target: int | None = None
    rate: float | None = None

    @property
    def inner(self) -> PoisoningAttack:
        """`base` as an attack, with `target` and `rate` put in.

        Raises:
            UnknownNameError: no attack of that name.
            ConfigurationError: an attack that does more than change training images.
        """
        from reprune.attacks import find_attack  # the registry holds the wrapping attacks too

        base = find_attack(self.base)() if isinstance(self.base, str) else self.base
        if not isinstance(base, PoisoningAttack):
            raise ConfigurationError(
                f"the base of {self.title} must be an attack that only changes training images, "
                f"such as badnets or blend, got {self.base!r}"
            )
        changes: dict[str, Any] = {"target": self.target, "rate": self.rate}
        return replace(base, **{name: one for name, one in changes.items() if one is not None})

    @property
    def goal(self) -> Goal:
        return self.inner.goal

    def check(self, data: ImageSet, num_classes: int) -> None:
        """What `base` raises, besides its own errors."""
        self.inner.check(data, num_classes)

    def check_network(self, model: Classifier, data: ImageSet) -> None:
        self.inner.check_network(model, data)

    @property
    def wants_surrogate(self) -> bool:
        return self.needs_surrogate or self.inner.wants_surrogate

    def _preview_trigger(self, data: ImageSet, setup: Setup, num_classes: int) -> Trigger:
        return self.inner._preview_trigger(data, setup, num_classes)

    @abstractmethod
    def _learn(
        self, model: Classifier, data: ImageSet, poisoned: Poisoned, setup: Setup
    ) -> tuple[Epoch, ...]:
        """Train `model` in place on `poisoned`, which was made of `data`."""

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        poisoned = self.inner._poison(data, setup, model.num_classes)
        history = self._learn(model, data, poisoned, setup)
        return Backdoored(model, poisoned.trigger, self.goal, history, poisoned.poisoned)
