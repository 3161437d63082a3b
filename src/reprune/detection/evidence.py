"""What a scan sees, and what a search says about the class that it finds most suspicious."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reprune.classifier import Classifier
from reprune.detection.families import FamilyName
from reprune.detection.inversion import Inverted
from reprune.detection.joint import Favourite, Recovered
from reprune.detection.margins import Margins
from reprune.results import BackdoorLabel, Epoch

RIVALS = 10
"""Classes of the joint search at most."""


@dataclass(frozen=True)
class Evidence:
    """What a scan saw, before any verdict.

    Attributes:
        inverted: masks and patterns for every class, recovered from the model alone.
        added: pictures to add for every class, which work in the model.
        margins: how far each class can be ahead of the others.
        label: the class that unlearned copies favour, if any was unlearned.
        exposed: the unlearned copies, of which those are left that favour the same class.
        joint: by family, pictures to add for every class that work in model and copies.
        favourites: by family, what these and the copies agree on.
        phases: epochs of the unlearning.
        seconds: by phase.
    """

    inverted: Inverted
    added: Recovered | None = None
    margins: Margins | None = None
    label: BackdoorLabel | None = None
    exposed: Sequence[Classifier] = ()
    joint: Mapping[FamilyName, Recovered] = field(default_factory=dict)
    favourites: Mapping[FamilyName, Favourite] = field(default_factory=dict)
    phases: Mapping[str, tuple[Epoch, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sign:
    """What one search says about the class that it finds most suspicious.

    Attributes:
        label: the class.
        strength: 1 where it accuses.
        reason: in words, with the figures.
    """

    label: int
    strength: float
    reason: str


def outlying(index: float, share: float, least: float, most: float) -> tuple[float, float]:
    """How far an index is on its way to `least`, and a share of the usual size on its to `most`.

    Both are 1 at their bounds, and 0 where either says nothing.
    """
    if share >= 1 or index <= 0:
        return 0.0, 0.0
    if most >= 1:
        return index / least, index / least
    return index / least, math.log(max(share, 1e-6)) / math.log(most)


def agreeing(histograms: Sequence[Sequence[int]]) -> list[int]:
    """The copies that favour the class which most of them favour."""
    favourites = [max(range(len(counts)), key=counts.__getitem__) for counts in histograms]
    most = max(favourites, key=favourites.count)
    return [i for i, label in enumerate(favourites) if label == most]


def rivals(added: Recovered, histograms: Sequence[Sequence[int]]) -> list[int]:
    """At most `RIVALS` classes: what the copies favour, and what small pictures reach."""
    shares = {k: min(counts[k] for counts in histograms) for k in added.classes}
    favoured = sorted((k for k in shares if shares[k]), key=lambda k: -shares[k])[: RIVALS // 3]
    sizes = dict(zip(added.classes, added.sizes, strict=True))
    small = sorted(added.classes, key=lambda k: math.inf if math.isnan(sizes[k]) else sizes[k])
    return sorted(list(dict.fromkeys([*favoured, *small]))[:RIVALS])
