"""Attacks whose trigger is one fixed stamp under the attacker's label."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from reprune.attacks.attack import Poisoned, PoisoningAttack, Setup, dirty_label
from reprune.attacks.goal import Goal
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet


@dataclass(frozen=True, kw_only=True)
class StampingAttack(PoisoningAttack):
    """A fixed stamp on `round(rate * n)` images, which get the attacker's label.

    Attributes:
        all_to_all: every class goes to the next one (`label + 1`); `target` is not used then
            (RNP, B.4 and Table 10).
    """

    all_to_all: bool = False

    @property
    def goal(self) -> Goal:
        return Goal(None if self.all_to_all else self.target)

    @abstractmethod
    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The stamp for images of `shape` (c, h, w); `ConfigurationError` if it does not fit."""

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        self.trigger(data.shape)

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        index = self._draw(data, setup.generator)
        trigger = self.trigger(data.shape)
        changed, rows = dirty_label(data, index, trigger, self.goal, num_classes)
        return Poisoned(changed, rows, trigger)
