"""`Evidence`: what a scan saw, before any verdict; and what is natural for its images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from reprune.classifier import Classifier
from reprune.detection.families import FamilyName
from reprune.detection.inversion import Inverted
from reprune.detection.joint import Favourite, Recovered
from reprune.detection.margins import Margins
from reprune.detection.waves import Led
from reprune.results import BackdoorLabel, Epoch

RIVALS = 10
"""Classes of the joint search at most."""

SIDE, NATURAL_WARP, NATURAL_FILTER, NATURAL_ADDED = 32, 8.0, 25.0, 1.0
"""In images of this side, without a backdoor, a warp leads to one class by mean squared steps of as
many pixels, and in colour a filter by a squared change of as many, and an added picture of as many
squared pixels to none; to most it takes more."""

COLOURS = 3
"""Channels of an image in colour."""


@dataclass(frozen=True)
class Evidence:
    """What a scan saw, before any verdict.

    Attributes:
        inverted: masks and patterns for every class, recovered from the model alone.
        alone: by family, triggers for every class that work in the model; filters only where
            nothing else is unusual, or after a second look for the classes of the joint search.
        elsewhere: one that leads each image to any class but its own (`ELSEWHERE`).
        flows: where that leads: of the images of class i, `flows[i][k]` go to class k.
        margins: how far each class can be ahead of the others.
        waves: where plain waves lead the images.
        label: the class that unlearned copies favour, if any was unlearned.
        of: how many classes the model has, of which those are searched; as many where not given.
        exposed: the unlearned copies, of which those are left that favour the same class.
        joint: by family, pictures to add for every class that work in model and copies.
        favourites: by family, what these and the copies agree on.
        phases: epochs of the unlearning.
        seconds: by phase.
        notes: what was not done, and why.
    """

    inverted: Inverted
    alone: Mapping[FamilyName, Recovered] = field(default_factory=dict)
    elsewhere: Recovered | None = None
    flows: Sequence[Sequence[int]] = ()
    margins: Margins | None = None
    waves: Led | None = None
    label: BackdoorLabel | None = None
    of: int | None = None
    exposed: Sequence[Classifier] = ()
    joint: Mapping[FamilyName, Recovered] = field(default_factory=dict)
    favourites: Mapping[FamilyName, Favourite] = field(default_factory=dict)
    phases: Mapping[str, tuple[Epoch, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> tuple[str, ...]:
        """The notes, and which classes were not searched."""
        searched = len(self.inverted.classes)
        if self.of is None or searched == self.of:
            return self.notes
        narrowed = (
            f"of {self.of} classes {searched} were searched for triggers: those that short "
            "searches lead to most easily, and others to compare them with"
        )
        return (narrowed, *self.notes)

    def noted(self, *notes: str) -> Evidence:
        """With more notes."""
        return replace(self, notes=(*self.notes, *notes))


def natural_warp(evidence: Evidence) -> float:
    """Mean squared steps, in pixels, that a warp to one class needs without a backdoor."""
    height, width = evidence.inverted.masks.shape[2:]
    return NATURAL_WARP * height * width / SIDE**2


def natural_filter(evidence: Evidence) -> float:
    """Squared change, in pixels, that a filter to one class makes without a backdoor."""
    return NATURAL_FILTER * _values(evidence)


def natural_added(evidence: Evidence) -> float:
    """Squared pixels of an added picture that lead to no class without a backdoor."""
    return NATURAL_ADDED * _values(evidence)


def _values(evidence: Evidence) -> float:
    """How many values an image has, over those of one in colour of side `SIDE`."""
    return math.prod(evidence.inverted.patterns.shape[1:]) / (COLOURS * SIDE**2)


def agreeing(histograms: Sequence[Sequence[int]]) -> list[int]:
    """The copies that favour the class which most of them favour."""
    favourites = [max(range(len(counts)), key=counts.__getitem__) for counts in histograms]
    most = max(favourites, key=favourites.count)
    return [i for i, label in enumerate(favourites) if label == most]


def rivals(added: Recovered, histograms: Sequence[Sequence[int]]) -> list[int]:
    """At most `RIVALS` classes: what the copies favour, and what small pictures reach."""
    shares = {k: min(counts) for k, counts in enumerate(zip(*histograms, strict=True))}
    favoured = sorted((k for k in shares if shares[k]), key=lambda k: -shares[k])[: RIVALS // 3]
    sizes = dict(zip(added.classes, added.sizes, strict=True))
    small = sorted(added.classes, key=lambda k: math.inf if math.isnan(sizes[k]) else sizes[k])
    return sorted(list(dict.fromkeys([*favoured, *small]))[:RIVALS])
