"""The user's images, divided, and a trigger that the user knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reprune.attacks.goal import Goal
from reprune.data import ImageSet, check_defence_data, draw, take
from reprune.errors import DataError
from reprune.models import LoadedModel
from reprune.types import Trigger

FEWEST_TEST_IMAGES, MOST_TEST_IMAGES = 100, 5000


@dataclass(frozen=True)
class Sample:
    """The user's images, divided: a method sees `defence`, accuracy is measured on `test`.

    `test` is what was left over, or the defence images themselves where that is fewer than
    100 images, or images of one class only.
    """

    defence: ImageSet
    test: ImageSet
    source: str
    seed: int

    @property
    def described(self) -> str:
        """Which images accuracy was measured on, in words."""
        if self.test is self.defence:
            return f"the {len(self.test):,} defence images themselves (too few others were given)"
        return f"{len(self.test):,} images that the method did not see"


@dataclass(frozen=True)
class KnownTrigger:
    """A trigger that the user knows. For evaluation only: no method ever gets it."""

    trigger: Trigger
    goal: Goal
    source: str

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Whether it can be evaluated on `data`.

        Raises:
            ConfigurationError: a target outside the classes.
            DataError: images of another size than the trigger, or none outside the target class.
        """
        self.goal.check(num_classes)
        self.trigger(data.pixels(slice(0, 1)))
        if not bool(self.goal.victims(data.labels).any()):
            raise DataError(
                f"the attack ({self.goal}) cannot be measured on these {len(data)} images: "
                + (
                    f"all are of the target class {self.goal.target}; add images of other classes"
                    if self.goal.source is None
                    else f"none is of the source class {self.goal.source}; add some"
                )
            )


def take_sample(
    data: ImageSet,
    loaded: LoadedModel,
    *,
    samples: int,
    seed: int,
    source: str,
    device: torch.device | str = "cpu",
) -> Sample:
    """Draw the defence images, class shares kept; up to 5,000 others measure accuracy.

    Raises:
        DataError: data that does not fit the model, or too little of it for a defence.
        ConfigurationError: a number of samples below 1.
    """
    classes, shape = loaded.classifier.num_classes, loaded.card.input_shape
    check_defence_data(data, classes, input_shape=shape)
    generator = torch.Generator().manual_seed(seed)
    defence, others = take(data, samples, generator)
    try:
        check_defence_data(defence, classes, input_shape=shape)
    except DataError as error:
        more = f"; {len(data):,} are given: draw more of them" * (samples < len(data))
        raise DataError(f"of the {samples} images drawn with --samples: {error}{more}") from error
    defence = defence.to(device)
    if len(others) < FEWEST_TEST_IMAGES or len(set(others.labels.tolist())) < 2:
        return Sample(defence, defence, source, seed)
    return Sample(defence, draw(others, MOST_TEST_IMAGES, generator).to(device), source, seed)
