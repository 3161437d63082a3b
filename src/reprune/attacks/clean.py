"""A clean model: the thirteenth "attack", which defences must do no harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reprune.attacks.attack import Attack, Backdoored, Setup
from reprune.classifier import Classifier
from reprune.data import ImageSet


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    """Plain training on the images as they are; no trigger, no target."""

    title: ClassVar[str] = "clean"
    source_paper: ClassVar[str] = "no attack"

    @property
    def goal(self) -> None:
        return None

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        history = setup.train(model, data)
        return Backdoored(model, None, None, history)
