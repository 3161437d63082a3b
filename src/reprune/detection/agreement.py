"""What searches say together that none says alone: agreement, and support of the joint search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from reprune.detection.signs import ADDED, DOUBTFUL, FILTERS, JOINT, PATCHES, SMOOTH, SUPPORT
from reprune.results import Sign, strongest

AGREEMENT = "agreement"
"""Name of the sign."""

TOGETHER = (JOINT, AGREEMENT)
"""How the names of signs begin that are of more than the model alone."""

DOUBTS = (*TOGETHER, FILTERS)
"""How the names of signs begin that never accuse."""

MANY, EIGHTH = 3, 0.125
"""So many kinds of searches agree from this strength of the weakest of them on."""

HALF = 0.5
"""Two do from this strength on, if one of them is the joint search."""

FAINT = 0.1
"""Strength of a sign that supports another one, at least."""

SEARCHES = 5
"""So many searches, of whatever kinds, agree where the weakest of them is not faint either."""


def kind_of(search: str) -> str:
    """Searches of one kind often name one class without a backdoor.

    Neural Cleanse, added and smooth pictures all ask how small a picture may be, and what is a
    small way to a class for one is so for the others.
    """
    if search.startswith(JOINT):
        return JOINT
    return "small pictures" if search in (PATCHES, ADDED, SMOOTH) else search


def agreement_sign(signs: Sequence[Sign], clear: float) -> list[Sign]:
    """The class that several searches name, none of them clearly: a reason for doubt.

    Three kinds of searches, or the joint search and one more, since each looks for something else;
    or five searches, since hardly anything but a backdoor shows in so many. Filters do not count,
    for natural ones lead to the classes that copies of clean models favour, too. It never accuses,
    and says nothing beside a sign that is a reason for doubt.

    Args:
        signs: of the searches.
        clear: strength from which a sign is a reason for doubt, in (0, 1].
    """
    if any(sign.strength >= clear for sign in signs):
        return []
    named = by_class(sign for sign in signs if sign.search != FILTERS)
    shares = {label: _agreed(some) for label, some in named.items()}
    label = max(shares, key=lambda label: shares[label], default=None)
    if label is None or not shares[label]:
        return []
    said = ", ".join(f"{s.search} {s.strength:.2f}" for s in named[label] if s.strength)
    reason = f"several searches name class {label} ({said})"
    return [Sign(AGREEMENT, label, min(clear * shares[label], DOUBTFUL), reason)]


def _agreed(signs: Sequence[Sign]) -> float:
    """How many times as strong as needed signs of one class agree; 0 where they do not.

    Args:
        signs: the strongest first.
    """
    kinds = by_kind(signs)
    alone = max((s for kind, s in kinds.items() if kind != JOINT), default=0.0)
    return max(
        min(kinds.get(JOINT, 0.0), alone) / HALF,
        weakest(list(kinds.values()), MANY) / EIGHTH,
        weakest([sign.strength for sign in signs], SEARCHES) / FAINT,
    )


def by_kind(signs: Iterable[Sign]) -> dict[str, float]:
    """The strength of the first sign of each kind."""
    kinds: dict[str, float] = {}
    for sign in signs:
        kinds.setdefault(kind_of(sign.search), sign.strength)
    return kinds


def by_class(signs: Iterable[Sign]) -> dict[int, list[Sign]]:
    """The signs of each class, the strongest first."""
    named: dict[int, list[Sign]] = {}
    for sign in sorted(signs, key=lambda sign: -sign.strength):
        if sign.label is not None:
            named.setdefault(sign.label, []).append(sign)
    return named


def weakest(strengths: Sequence[float], count: int) -> float:
    """Of the first so many, the strongest first; 0 where there are fewer."""
    return strengths[count - 1] if len(strengths) >= count else 0.0


def supporting(signs: Sequence[Sign]) -> list[Sign]:
    """Signs of searches in the model alone for the class that casts doubt, where none accuses."""
    first = strongest(signs)
    if first is None or not first.search.startswith(DOUBTS):
        return []
    alone = [sign for sign in signs if not sign.search.startswith(TOGETHER)]
    return [sign for sign in alone if sign.label == first.label and sign.strength >= FAINT]


def led_by_copies(signs: Iterable[Sign]) -> bool:
    """Whether the strongest sign is that of the unlearned copies, which never accuses."""
    first = strongest(signs)
    return first is not None and first.search.startswith(JOINT)


def lone_doubt(signs: Sequence[Sign], clear: float) -> Sign | None:
    """The sign that makes a model doubtful, where no search of another kind names its class.

    Filters, which are sought to settle this alone, name the class of the smallest one, however
    little smaller it is.

    Args:
        signs: of the searches.
        clear: strength from which a sign is a reason for doubt, in (0, 1].
    """
    first = strongest(signs)
    if first is None or not clear <= first.strength < 1:
        return None
    others = (
        s for s in signs if s.label == first.label and kind_of(s.search) != kind_of(first.search)
    )
    supported = any(s.search == FILTERS or s.strength >= FAINT for s in others)
    return None if supported else first


def settled(signs: Sequence[Sign], clear: float) -> list[Sign]:
    """After a second look: the joint search alone is no reason for doubt any more."""
    lone = lone_doubt(signs, clear)
    if lone is None or not lone.search.startswith(JOINT):
        return list(signs)
    return [
        replace(
            sign,
            strength=min(sign.strength, SUPPORT * clear),
            reason=f"{sign.reason}; no search in the model alone names it",
        )
        if sign.search.startswith(JOINT)
        else sign
        for sign in signs
    ]
