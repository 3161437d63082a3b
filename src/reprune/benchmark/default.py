"""Which experiments show what the default method, `auto`, does, and what its steps are good for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from reprune.benchmark.papers import ATTACKS, FORMER, lines, woken
from reprune.benchmark.profiles import Profile
from reprune.benchmark.spec import Part
from reprune.benchmark.table import Row
from reprune.defenses.distilling import Distilling
from reprune.defenses.trigger_bank import SEARCHES

UNFITTED = ("cl", "dynamic", "awp", "a-blend")
"""Attacks that no setting of the repair was chosen on; docs/auto.md says which were."""

_STEPS: dict[str, dict[str, Any]] = {
    "all steps": {},
    "no copies": {"scan.unlearning": None},
    "no margins": {"scan.margins": None},
    "no waves": {"scan.waves": None},
    "no patches": {
        "search.searches": [asdict(s) for s in SEARCHES if s.family != "patch"],
    },
    "patches only": {"search.searches": [{"family": "patch"}]},
    "no exaggeration": {"search.strongest": 1.0},
    "suspects only": {"search.everywhere": None},
    "all directions": {"distilling.ridge": 1e9},
    "one rate": {"rates": [0.03]},
    "no guard": {"max_accuracy_drop": 1.0},
}

STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "auto": {
        **_STEPS,
        "last half": {"distilling.depth": 0.5},
        "no mixtures": {"distilling.mixed": 0.0},
        "nothing repelled": {"distilling.repelled": 0.0},
    },
    FORMER: {**_STEPS, "all layers": {"distilling.depth": 1.0}},
}
"""By the default of today and what it was: settings with one step left out or done in a plainer
way, by what is changed.
"""

SAID = {
    "depth": "depth",
    "mixed": "mixtures",
    "repelled": "repelled",
    "ridge": "ridge",
    "steps": "steps",
    "temperature": "temperature",
    "weight": "triggers",
}
"""How settings of the lessons are called in a table."""

BASE = {name: getattr(Distilling(), name) for name in ("depth", "mixed", "repelled")}
"""The default's; around these one setting at a time is changed."""

CANDIDATES: list[dict[str, float]] = [
    *(
        {"depth": depth, "mixed": mixed, "repelled": 0.0}
        for depth in (0.5, 1.0)
        for mixed in (0.0, 1.0, 3.0)
    ),
    *({**BASE, "repelled": repelled} for repelled in (0.1, 0.25, 0.5, 1.0)),
    *({**BASE, "mixed": mixed} for mixed in (0.0, 1.0)),
    {**BASE, "depth": 0.5},
    *({**BASE, "ridge": ridge} for ridge in (0.03, 0.3)),
    *({**BASE, "steps": steps} for steps in (64, 256)),
    *({**BASE, "temperature": temperature} for temperature in (1.0, 4.0)),
    *({**BASE, "weight": weight} for weight in (0.5, 2.0)),
]

SETTINGS: dict[str, dict[str, Any]] = {
    ", ".join(f"{SAID[name]} {value:g}" for name, value in values.items()): {
        f"distilling.{name}": value for name, value in values.items()
    }
    for values in CANDIDATES
}
"""Settings of the repair among which the default is chosen, without each attack in turn."""


def settings(size: Profile) -> Iterable[Row]:
    """`auto` with each of `SETTINGS`, on all attacks and draws."""
    for attack in ATTACKS:
        where = {"data": "cifar10", "attack": attack}
        methods = dict.fromkeys(SETTINGS, "auto")
        yield from lines(size, where, size.models(attack), methods, settings=SETTINGS)


def settings_woken(size: Profile) -> Iterable[Row]:
    """The same on the last draw, with the attacks that wake a sleeping backdoor."""
    yield from map(woken, settings(size))


def steps(size: Profile) -> Iterable[Row]:
    """Both with each of their `STEPS` in turn, on one draw."""
    one = replace(size, draws=1)
    for attack, (whole, changed) in product(UNFITTED, STEPS.items()):
        where = {"data": "cifar10", "attack": attack, "default": whole}
        methods = dict.fromkeys(changed, whole)
        yield from lines(one, where, one.models(attack), methods, settings=changed)


def data(size: Profile) -> Iterable[Row]:
    """Both with fewer images, and with images that the model has not seen."""
    one = replace(size, draws=1, test_images=size.test_images or 5000)
    parts: tuple[tuple[int, Part], ...] = ((500, "train"), (100, "train"), (500, "test"))
    for attack, (images, part) in product((*ATTACKS, "clean"), parts):
        where = {"data": "cifar10", "attack": attack, "images": images, "part": part}
        given: dict[str, Any] = {"images": images, "part": part}
        yield from lines(one, where, one.models(attack), {name: name for name in STEPS}, **given)
