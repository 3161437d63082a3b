"""What a scan sees, and what a search says about the class that it finds most suspicious."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from reprune.classifier import Classifier
from reprune.detection.families import FamilyName
from reprune.detection.inversion import Inverted
from reprune.detection.joint import Favourite, Recovered
from reprune.detection.margins import Margins
from reprune.detection.neural_cleanse import FEWEST_CLASSES, anomaly_indices
from reprune.results import BackdoorLabel, Epoch

RIVALS = 10
"""Classes of the joint search at most."""

DOUBTFUL = 0.99
"""Strength that a sign which does not accuse has at most."""


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


def added_sign(added: Recovered, index: float, ratio: float) -> list[Sign]:
    """The class that needs the smallest added picture, among those that have one.

    `index` and `ratio` as in `Scan`; nothing where too few classes have one.
    """
    sizes = {k: s for k, s in zip(added.classes, added.sizes, strict=True) if math.isfinite(s)}
    if len(sizes) < FEWEST_CLASSES:
        return []
    indices = dict(zip(sizes, anomaly_indices(list(sizes.values()), 1), strict=True))
    first = min(sizes, key=sizes.__getitem__)
    low = quantiles(sizes.values(), n=4, method="inclusive")[0]
    share = sizes[first] / low
    strength = math.sqrt(math.prod(outlying(indices[first], share, index, ratio)))
    reason = (
        f"class {first} needs the smallest added picture: {sizes[first]:.2f} squared pixels, "
        f"{share:.0%} of the lower quartile {low:.2f} over the classes (anomaly index "
        f"{indices[first]:.1f})"
    )
    return [Sign(first, strength, reason)]


def ahead_sign(margins: Margins, ahead: float) -> list[Sign]:
    """The class that can be furthest ahead of the others; `ahead` as in `Scan`."""
    leader = margins.leader()
    if leader is None:
        return []
    label, ratio = leader
    reason = f"class {label} can be ahead of all others {ratio:.2f} times as far as any other class"
    return [Sign(label, math.log(ratio) / math.log(ahead), reason)]


def joint_sign(
    favourites: Mapping[FamilyName, Favourite], doubt: float, clear: float
) -> list[Sign]:
    """The favourite of the families, of the strongest; where they disagree each, of the weakest.

    The strength is `clear` at `doubt`, both as in `Scan`, and never accuses.
    """
    ordered = sorted(favourites.items(), key=lambda item: -item[1].strength)
    agree = len({found.label for _, found in ordered}) == 1
    telling = ordered[0 if agree else -1][1]
    strength = min(clear * telling.strength / doubt, DOUBTFUL)
    return [
        Sign(
            found.label,
            strength,
            f"class {found.label} needs the smallest added picture ({family}) to work in the model "
            f"and in its unlearned copies, {math.exp(found.gap):.1f} times smaller than the next "
            f"class; the copies agree on {found.share:.0%} of the clean images",
        )
        for family, found in (ordered[:1] if agree else ordered)
    ]


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
