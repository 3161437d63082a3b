"""What each search of a scan says: the class that it finds most suspicious, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import quantiles

from reprune.detection.evidence import Evidence
from reprune.detection.families import FamilyName
from reprune.detection.joint import FARTHEST, Favourite, Recovered
from reprune.detection.margins import Margins
from reprune.detection.neural_cleanse import FEWEST_CLASSES, anomaly_indices
from reprune.detection.waves import Led
from reprune.results import Sign

PATCHES, ADDED, SMOOTH, WARPS = "Neural Cleanse", "added pictures", "smooth pictures", "warps"
"""Names of searches in the model alone; the first gives its reasons itself."""

FILTERS, MARGINS = "filters", "largest margins"
"""Names of others."""

FAMILY_OF: Mapping[str, FamilyName] = {
    PATCHES: "patch",
    ADDED: "additive",
    SMOOTH: "smooth",
    WARPS: "warp",
    FILTERS: "filter",
}
"""What these find."""

JOINT = "joint inversion"
"""Name of the search in model and copies, before that of the family."""

DOUBTFUL = 0.99
"""Strength, at most, of a sign that does not accuse."""

SUPPORT = 0.5
"""Strength, at most, of a sign that is no reason for doubt either."""

SCATTERED = 0.5
"""Of an all-to-all backdoor, the classes have more different aims than this share of them."""

FEWEST_IMAGES = 5
"""Of each class, on average, that show where a picture leads them."""

USUAL_CLASSES = 10
"""Of the data sets that the bounds on sizes were set with."""


def towards(value: float, bound: float) -> float:
    """How far a ratio is on its way from 1 to `bound`, on logarithms; below 0 on the other side."""
    return math.log(max(value, 1e-6)) / math.log(bound)


def lower_quartile(sizes: Iterable[float]) -> float:
    return quantiles(sizes, n=4, method="inclusive")[0]


def outlying(index: float, share: float, least: float, most: float) -> tuple[float, float]:
    """How far an index is on its way to `least`, and a share of the usual size on its to `most`.

    Both are 1 at their bounds, and 0 where either says nothing.
    """
    if share >= 1 or index <= 0:
        return 0.0, 0.0
    if most >= 1:
        return index / least, index / least
    return index / least, towards(share, most)


def crowded(classes: int) -> float:
    """What the smallest size of so many classes says, over what that of `USUAL_CLASSES` says.

    The lowest of n values lies about sqrt(2 ln n) standard deviations below their mean by chance
    (normal values, large n): of 43 traffic signs some need a far smaller picture than most.
    """
    if classes <= USUAL_CLASSES:
        return 1.0
    return math.sqrt(math.log(USUAL_CLASSES) / math.log(classes))


def added_signs(
    added: Recovered, index: float, ratio: float, classes: int | None = None
) -> list[Sign]:
    """The class that needs the smallest added picture, and others that accuse as well.

    `index` and `ratio` as in `Scan`, `classes` those of the model, where it has more; nothing where
    too few classes have a picture.
    """
    return accusing(_smallest(added, index, ratio, classes or len(added.classes)))


def _smallest(added: Recovered, index: float, ratio: float, classes: int) -> list[Sign]:
    """A sign for each class, that of the smallest picture first."""
    sizes = {k: s for k, s in zip(added.classes, added.sizes, strict=True) if math.isfinite(s)}
    if len(sizes) < FEWEST_CLASSES:
        return []
    indices = dict(zip(sizes, anomaly_indices(list(sizes.values()), 1), strict=True))
    low = lower_quartile(sizes.values())
    signs = []
    for label, size in sorted(sizes.items(), key=lambda item: item[1]):
        share = size / low
        strength = math.sqrt(math.prod(outlying(indices[label], share, index, ratio)))
        strength *= crowded(classes)
        reason = (
            f"class {label} needs an added picture of only {size:.2f} squared pixels, {share:.0%} "
            f"of the lower quartile {low:.2f} over the classes (anomaly index {indices[label]:.1f})"
        )
        signs.append(Sign(ADDED, label, strength, reason))
    return signs


def several_signs(added: Recovered, natural: float, ratio: float) -> list[Sign]:
    """The classes that added pictures lead to which are too small for any class, if several.

    What is small beside other classes (`added_signs`) says little then, for targets are among what
    is usual. Nothing where most classes are so: that model is led anywhere.

    Args:
        added: triggers of the family.
        natural: see `natural_added`.
        ratio: share of that from which a class is accused, in (0, 1).
    """
    sizes = sorted(
        (size, label)
        for label, size in zip(added.classes, added.sizes, strict=True)
        if not math.isnan(size)
    )
    signs = [
        Sign(
            ADDED,
            label,
            strength,
            f"class {label} needs an added picture of only {size:.2f} squared pixels; without a "
            f"backdoor no class needs less than {natural:.2f}",
        )
        for size, label in sizes
        if (strength := towards(size / natural, ratio)) >= 1
    ]
    return signs if 2 <= len(signs) <= len(sizes) / 2 else []


def one_of_each(signs: Iterable[Sign]) -> list[Sign]:
    """Of signs of one search for one class the strongest; in the order of the first of each."""
    kept: dict[tuple[str, int | None], Sign] = {}
    for sign in signs:
        other = kept.get((sign.search, sign.label), sign)
        kept[sign.search, sign.label] = max(other, sign, key=lambda one: one.strength)
    return list(kept.values())


def smooth_sign(
    smooth: Recovered, index: float, ratio: float, gap: float, classes: int | None = None
) -> list[Sign]:
    """As `added_signs` of smooth pictures; and the next class has to need `gap` times as much.

    Sizes of smooth pictures are spread wider over the classes of clean models.
    """
    classes = classes or len(smooth.classes)
    signs = _smallest(smooth, index, ratio, classes)[:1]
    if not signs:
        return []
    first, second = sorted(filter(math.isfinite, smooth.sizes))[:2]
    ahead = towards(second / first, gap) * crowded(classes)
    reason = (
        f"class {signs[0].label} needs a smooth picture of only {first:.2f} squared pixels, "
        f"{second / first:.1f} times smaller than the next class"
    )
    return [Sign(SMOOTH, signs[0].label, min(signs[0].strength, ahead), reason)]


def warp_sign(warps: Recovered, natural: float, bent: float) -> list[Sign]:
    """The class that the smallest warp leads to, if any.

    Args:
        warps: triggers of the family.
        natural: see `natural_warp`.
        bent: share of that from which it accuses, in (0, 1).
    """
    size = min(warps.sizes, key=lambda s: math.inf if math.isnan(s) else s)
    if not math.isfinite(size):
        return []
    first = warps.classes[warps.sizes.index(size)]
    strength = max(0.0, towards(size / natural, bent))
    reason = (
        f"a smooth warp that moves pixels by {math.sqrt(size):.1f} pixels (root mean square) "
        f"leads to class {first}; without a backdoor it takes {math.sqrt(natural):.1f} or more"
    )
    return [Sign(WARPS, first, strength, reason)]


def filter_sign(filters: Recovered, gap: float, natural: float, ratio: float) -> list[Sign]:
    """The class that the smallest filter leads to: natural colours lead to some, too.

    It supports other searches, and is a reason for doubt only where it is smaller than natural
    ones, too. It never accuses.

    Args:
        filters: triggers of the family.
        gap, ratio: as in `Scan`.
        natural: see `natural_filter`.
    """
    known = sorted(
        (size, label)
        for label, size in zip(filters.classes, filters.sizes, strict=True)
        if not math.isnan(size)
    )
    if len(known) < 2 or not math.isfinite(known[0][0]):
        return []
    (first, label), (second, _) = known[:2]
    ahead = min(second / first, FARTHEST)
    small = min(towards(first / natural, ratio), DOUBTFUL)
    reason = (
        f"a filter that changes pictures by {first:.1f} squared pixels leads to class {label}; "
        f"to the next class it takes {ahead:.1f} times as much"
    )
    return [Sign(FILTERS, label, min(towards(ahead, gap), max(small, SUPPORT)), reason)]


def accusing(signs: Sequence[Sign]) -> list[Sign]:
    """The first sign, and of the others those that accuse: there may be several targets."""
    return [*signs[:1], *(sign for sign in signs[1:] if sign.strength >= 1)]


def elsewhere_sign(evidence: Evidence, ratio: float) -> list[Sign]:
    """Whether a small picture leads each class to another one (all-to-all).

    Without a backdoor a picture that leads all images elsewhere has to be larger than those to one
    class, and leads them to few classes. Of too few images of each class, where they go is chance.
    `ratio` as in `Scan`.
    """
    added, found = evidence.alone.get("additive"), evidence.elsewhere
    if added is None or found is None:
        return []
    known, size = [size for size in added.sizes if math.isfinite(size)], found.sizes[0]
    aims = [max(range(len(row)), key=row.__getitem__) for row in evidence.flows if any(row)]
    few = sum(map(sum, evidence.flows)) < FEWEST_IMAGES * len(evidence.flows)
    if len(known) < FEWEST_CLASSES or not math.isfinite(size) or not aims or few:
        return []
    low = lower_quartile(known)
    reason = (
        f"an added picture of {size:.2f} squared pixels, {size / low:.0%} of the lower quartile "
        f"{low:.2f} over the classes, leads the images of {len(aims)} classes to "
        f"{len({*aims})} other ones"
    )
    scattered = len({*aims}) > SCATTERED * len(aims)
    strength = max(0.0, towards(size / low, ratio)) * scattered
    return [Sign("all-to-all", None, strength, reason)]


def ahead_sign(margins: Margins, ahead: float) -> list[Sign]:
    """The class that can be furthest ahead of the others; `ahead` as in `Scan`."""
    leader = margins.leader()
    if leader is None:
        return []
    label, ratio = leader
    reason = f"class {label} can be ahead of all others {ratio:.2f} times as far as any other class"
    return [Sign(MARGINS, label, towards(ratio, ahead), reason)]


def wave_sign(waves: Led, pull: float, led: float) -> list[Sign]:
    """The class that plain waves pull to hardest; `pull` and `led` as in `Scan`."""
    label, ratio = waves.leader()
    best = waves.best(label)[0]
    wave, chance = waves.waves[best], float(waves.chances[best, label])
    reason = (
        f"a plain wave of amplitude {waves.amplitude:.2f}, {wave.across} periods across and "
        f"{wave.down} down, gives class {label} a mean probability of {chance:.0%}; no wave pulls "
        f"to another class more than 1/{ratio:.1f} as hard"
    )
    return [Sign("waves", label, min(towards(ratio, pull), chance / led), reason)]


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
            f"{JOINT}, {family}",
            found.label,
            strength,
            f"class {found.label} needs the smallest added picture ({family}) to work in the model "
            f"and in its unlearned copies, {math.exp(found.gap):.1f} times smaller than the next "
            f"class; the copies agree on {found.share:.0%} of the clean images",
        )
        for family, found in (ordered[:1] if agree else ordered)
    ]
