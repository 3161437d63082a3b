"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from reprune.defense import Defense
from reprune.errors import UnknownNameError
from reprune.rnp import RNP


def _rnp(preset: Callable[[], RNP]) -> Callable[[float], Defense]:
    def make(max_accuracy_drop: float) -> Defense:
        settings = preset()
        pruning = replace(settings.pruning, max_accuracy_drop=max_accuracy_drop)
        return replace(settings, pruning=pruning)

    return make


DEFENSES: dict[str, Callable[[float], Defense]] = {
    "rnp": _rnp(RNP),
    "rnp:paper": _rnp(RNP.paper),
    "rnp:released": _rnp(RNP.released),
}


def make_defense(name: str, *, max_accuracy_drop: float = 0.02) -> Defense:
    """The method called `name`, with the accuracy it may cost in [0, 1].

    Raises:
        UnknownNameError: no such method; the message lists the known ones.
    """
    if name not in DEFENSES:
        raise UnknownNameError(f"unknown method {name!r}; known methods: {', '.join(DEFENSES)}")
    return DEFENSES[name](max_accuracy_drop)
