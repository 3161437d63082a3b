"""The triggers that teach and those that judge, and which of them are sought."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import fmean

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.distilling import Lesson
from reprune.detection import FamilyName, Joint
from reprune.detection.joint import check_families
from reprune.errors import ConfigurationError
from reprune.evaluation import flip_rate
from reprune.types import Trigger

INNOCENTS = 5
"""Classes whose natural triggers say how large a trigger has to be without a backdoor."""


@dataclass(frozen=True)
class Search:
    """Which triggers are recovered.

    Attributes:
        family: a name of `reprune.detection.FAMILIES`.
        joint: whether they have to work in the unlearned copies, too.
    """

    family: FamilyName
    joint: bool = False

    def __str__(self) -> str:
        return self.family + " (joint)" * self.joint


SEARCHES = (
    Search("patch"),
    Search("additive"),
    Search("smooth"),
    Search("warp"),
    Search("additive", joint=True),
    Search("smooth", joint=True),
    Search("filter", joint=True),
)

OVERLOOKED: tuple[FamilyName, ...] = ("filter", "additive", "smooth")
"""What is sought in a repaired model."""


@dataclass(frozen=True, kw_only=True)
class TriggerSearch:
    """Which triggers are recovered, and which of them are kept.

    Attributes:
        searches: the kinds of triggers. Those that support a suspect of a model that is not
            accused are added.
        joint: settings of these searches.
        lessons: triggers of each kind and class that teach; one more of each judges.
        min_flip: share of the images that a trigger must send to its class to be kept.
        strongest: how many times a trigger is exaggerated at most.
        smaller: a trigger is kept if its size is below this share of the natural one.
        everywhere: times that the scan's added pictures for the other classes are exaggerated at
            most, where these teach, too. `None` goes without them.
    """

    searches: tuple[Search, ...] = SEARCHES
    joint: Joint = field(default_factory=Joint)
    lessons: int = 3
    min_flip: float = 0.5
    strongest: float = 6.0
    smaller: float = 0.5
    everywhere: float | None = 2.0

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        self.joint.check()
        if not self.searches:
            raise ConfigurationError("there has to be a search for triggers")
        check_families([search.family for search in self.searches])
        if self.lessons < 1:
            raise ConfigurationError(f"lessons must be at least 1, got {self.lessons}")
        for name in ("min_flip", "smaller"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("strongest", "everywhere"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < math.inf:
                raise ConfigurationError(f"{name} must be at least 1, got {value}")

    @property
    def looks(self) -> tuple[FamilyName, ...]:
        """What is sought in a repaired model (`overlooked`); nothing where no filters are."""
        return OVERLOOKED if any(search.family == "filter" for search in self.searches) else ()

    def passes(self, images: int, suspects: int) -> float:
        """Images through networks at most, over `images`."""
        triggers = (len(self.searches) + len(self.looks)) * suspects * (self.lessons + 1)
        natural = (2 + bool(self.looks)) * INNOCENTS
        return self.joint.passes(images, 1) * (triggers + natural) + triggers


@dataclass(frozen=True)
class Kept:
    """A recovered trigger: how large, and as a lesson."""

    size: float
    lesson: Lesson

    @property
    def label(self) -> int:
        """The class it leads to."""
        return self.lesson.label

    @property
    def strongest(self) -> Trigger:
        """The trigger as it is in the hardest lesson."""
        return lambda images: self.lesson.apply(images, self.lesson.strongest)


@dataclass(frozen=True)
class Bank:
    """Recovered triggers: those that teach, and others of the same kinds that only judge.

    Attributes:
        lessons, judges: for the suspects.
        others: added pictures for the other classes, in case that the suspects are wrong.
        hurried: whether there was no time for all kinds.
    """

    lessons: tuple[Kept, ...]
    judges: tuple[Kept, ...]
    others: tuple[Kept, ...] = ()
    hurried: bool = False

    def extended(self, other: Bank) -> Bank:
        """With the lessons and judges of another one."""
        return replace(
            self, lessons=self.lessons + other.lessons, judges=self.judges + other.judges
        )

    def moved(self, model: Classifier, images: ImageSet) -> float:
        """Share of the images of other classes that the judges lead to theirs, on average."""
        return fmean(flip_rate(model, images, one.strongest, one.label) for one in self.judges)

    def taught(self, *, everywhere: bool = False) -> list[Lesson]:
        """What is distilled out; `everywhere` as often pictures for the other classes, too."""
        if not everywhere:
            return [one.lesson for one in self.lessons]
        times = max(1, round(len(self.others) / max(1, len(self.lessons))))
        return [one.lesson for one in (*self.lessons * times, *self.others)]
