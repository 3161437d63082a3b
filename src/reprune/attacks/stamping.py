"""Attacks whose trigger is one stamp under the attacker's label."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from reprune.attacks.attack import Setup
from reprune.attacks.goal import Goal
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, dirty_label
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet


@dataclass(frozen=True, kw_only=True)
class StampPoisoning(PoisoningAttack):
    """One stamp on `round(rate * n)` images, which get the attacker's label.

    Attributes:
        all_to_all: every class goes to the next one (`label + 1`); `target` is not used then
            (RNP, B.4 and Table 10).
    """

    all_to_all: bool = False

    @property
    def goal(self) -> Goal:
        return Goal(None if self.all_to_all else self.target)

    @abstractmethod
    def _stamp(self, data: ImageSet, setup: Setup) -> Stamp:
        """The stamp for these images. For authors of attacks; everything is checked."""

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        index = self._draw(data, setup.generator)
        trigger = self._stamp(data, setup)
        changed, rows = dirty_label(data, index, trigger, self.goal, num_classes)
        return Poisoned(changed, rows, trigger)


@dataclass(frozen=True, kw_only=True)
class StampingAttack(StampPoisoning):
    """A stamp that the parameters alone decide."""

    @abstractmethod
    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The stamp for images of `shape` (c, h, w); `ConfigurationError` if it does not fit."""

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        self.trigger(data.shape)

    def _stamp(self, data: ImageSet, setup: Setup) -> Stamp:
        return self.trigger(data.shape)
