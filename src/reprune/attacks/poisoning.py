"""Attacks that change training images, and what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reprune.attacks.attack import Backdoored, Setup, TargetedAttack
from reprune.attacks.goal import Goal, stamped
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.types import Progress, Trigger, silent


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set.

    Attributes:
        data: all images, poisoned ones in their places.
        poisoned: `(n,)` bool, the rows that push a triggered image to the attacker's label.
        trigger: what an attacker applies to images after the training.
        covered: `(n,)` bool, rows that carry (a part of) the trigger under their true label.
    """

    data: ImageSet
    poisoned: Tensor
    trigger: Trigger
    covered: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PoisoningAttack(TargetedAttack):
    """An attack that changes training images (and labels) and leaves the training alone."""

    @abstractmethod
    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        """The poisoned set. For authors of attacks; everything is checked."""

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        poisoned = self._poison(data, setup, model.num_classes)
        history = setup.train(model, poisoned.data)
        return Backdoored(model, poisoned.trigger, self.goal, history, poisoned.poisoned)

    def _preview_trigger(self, data: ImageSet, setup: Setup, num_classes: int) -> Trigger:
        return self._poison(data, setup, num_classes).trigger

    def _draw(self, data: ImageSet, generator: torch.Generator) -> Tensor:
        """The rows to poison: `round(rate * n)` drawn from all, or from the target class."""
        count = round(self.rate * len(data))
        if not self.clean_label:
            return torch.randperm(len(data), generator=generator)[:count].to(data.device)
        rows = (data.labels == self.target).nonzero().flatten()
        chosen = torch.randperm(len(rows), generator=generator)[:count]
        return rows[chosen.to(rows.device)]


def poison(
    data: ImageSet,
    attack: PoisoningAttack,
    generator: torch.Generator,
    *,
    num_classes: int | None = None,
    surrogate: Classifier | None = None,
    progress: Progress = silent,
) -> Poisoned:
    """Poison a training set: `round(rate * n)` images, drawn at random.

    Images of the target class are drawn like the others, as in the published recipes; clean-label
    attacks draw from the target class alone and change no label.

    Args:
        data: clean labelled training images.
        attack: the attack and its parameters.
        generator: all randomness.
        num_classes: by default the number of class names, else the largest label and one.
        surrogate: a trained clean classifier, for attacks that need one.
        progress: told by attacks that optimise.

    Raises:
        ConfigurationError: parameters that do not fit the images, or no surrogate.
    """
    classes = num_classes or data.num_classes
    attack.check(data, classes)
    attack._check_surrogate(surrogate, data)
    setup = Setup(generator=generator, surrogate=surrogate, progress=progress)
    return attack._poison(data, setup, classes)


def replaced(
    data: ImageSet, index: Tensor, images: Tensor, labels: Tensor | None = None
) -> tuple[ImageSet, Tensor]:
    """A copy of `data` with other images (and labels) at `index`, and these rows as `(n,)` bool."""
    all_images, all_labels = data.images.clone(), data.labels.clone()
    all_images[index] = images
    if labels is not None:
        all_labels[index] = labels
    rows = torch.zeros(len(data), dtype=torch.bool, device=data.device)
    rows[index] = True
    return replace(data, images=all_images, labels=all_labels), rows


def dirty_label(
    data: ImageSet, index: Tensor, trigger: Trigger, goal: Goal, num_classes: int
) -> tuple[ImageSet, Tensor]:
    """The images at `index` with the trigger and the attacker's labels, and these rows."""
    wanted = goal.wanted(data.labels[index], num_classes)
    return replaced(data, index, stamped(data, index, trigger), wanted)
