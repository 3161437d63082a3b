"""What the attacker wants: which images should get which label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.types import Trigger


@dataclass(frozen=True)
class Goal:
    """Which label a triggered image is to get, and which images count for the success rate.

    Attributes:
        target: the class that the trigger asks for; `None` for all-to-all, `label + 1`.
        source: the only class that the trigger is meant for; `None` for every class.
    """

    target: int | None
    source: int | None = None

    @classmethod
    def of(cls, goal: Goal | int) -> Goal:
        """A class index stands for "every class goes there"."""
        return goal if isinstance(goal, Goal) else cls(goal)

    def check(self, num_classes: int) -> None:
        """Raises `ConfigurationError` unless target and source are classes and differ."""
        for name, label in (("target", self.target), ("source", self.source)):
            if label is not None and not 0 <= label < num_classes:
                raise ConfigurationError(
                    f"a trigger needs a {name} class in 0..{num_classes - 1}, got {label}"
                )
        if self.source is not None and self.source == self.target:
            raise ConfigurationError(f"source and target are the same class {self.target}")

    def victims(self, labels: Tensor) -> Tensor:
        """Which images show whether the attack works: `(n,)` bool.

        Those of the source class if there is one, without those of the target class.
        """
        if self.source is not None:
            return labels == self.source
        if self.target is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return labels != self.target

    def wanted(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels that the attacker asks for, `(n,)` int64."""
        if self.target is None:
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)

    def __str__(self) -> str:
        if self.target is None:
            return "every class to the next"
        start = "any class" if self.source is None else f"class {self.source}"
        return f"{start} to class {self.target}"


def triggered(data: ImageSet, trigger: Trigger, goal: Goal | int) -> ImageSet:
    """The images that show whether the attack works, with the trigger; labels stay the true ones.

    Images that already belong to the target class are left out. uint8 images stay uint8: the
    trigger is rounded to 8 bits, as in a picture that is sent.
    """
    index = Goal.of(goal).victims(data.labels).nonzero().flatten()
    return ImageSet(stamped(data, index, trigger), data.labels[index], data.class_names)


@torch.no_grad()
def stamped(data: ImageSet, index: Tensor, trigger: Trigger, batch_size: int = 500) -> Tensor:
    """The images at `index` with the trigger, in the type of `data.images`."""
    if not len(index):
        return data.images[index]
    rows = torch.split(index, batch_size)
    return torch.cat([as_stored(trigger(data.pixels(some)), data) for some in rows])


def as_stored(pixels: Tensor, data: ImageSet) -> Tensor:
    """Pixels in [0, 1] in the type of `data.images`: rounded to 8 bits if that is uint8."""
    if data.images.dtype == torch.uint8:
        return pixels.mul(255).round().clamp(0, 255).byte()
    return pixels
