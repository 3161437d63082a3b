"""Which experiments show what the default method, `auto`, does, and what its steps are good for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from reprune.benchmark.papers import ATTACKS, lines, woken
from reprune.benchmark.profiles import Profile
from reprune.benchmark.spec import Part
from reprune.benchmark.table import Row
from reprune.defenses.trigger_bank import SEARCHES

UNFITTED = ("cl", "dynamic", "awp", "a-blend")
"""Attacks that no setting of the repair was chosen on; docs/auto.md says which were."""

STEPS: dict[str, dict[str, Any]] = {
    "auto": {},
    "no copies": {"scan.unlearning": None},
    "no margins": {"scan.margins": None},
    "no waves": {"scan.waves": None},
    "no patches": {
        "search.searches": [asdict(s) for s in SEARCHES if s.family != "patch"],
    },
    "patches only": {"search.searches": [{"family": "patch"}]},
    "no exaggeration": {"search.strongest": 1.0},
    "suspects only": {"search.everywhere": None},
    "all layers": {"distilling.depth": 1.0},
    "all directions": {"distilling.ridge": 1e9},
    "one rate": {"rates": [0.03]},
    "no guard": {"max_accuracy_drop": 1.0},
}
"""Settings of `auto` with one step left out or done in a plainer way, by what is changed."""


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

BASE = {"depth": 1.0, "mixed": 1.0, "repelled": 0.5}
"""Around these one setting at a time is changed."""

CANDIDATES: list[dict[str, float]] = [
    *({"depth": depth, "mixed": mixed} for depth in (0.5, 1.0) for mixed in (0.0, 1.0, 3.0)),
    *({"depth": depth, "mixed": 0.0, "repelled": 0.5} for depth in (0.5, 1.0)),
    *({**BASE, "repelled": repelled} for repelled in (0.25, 0.5, 1.0)),
    {**BASE, "mixed": 3.0},
    *({**BASE, "ridge": ridge} for ridge in (0.03, 0.3)),
    *({**BASE, "steps": steps} for steps in (64, 256)),
    *({**BASE, "temperature": temperature} for temperature in (1.0, 4.0)),
    *({**BASE, "weight": weight} for weight in (0.5, 2.0)),
]

SETTINGS: dict[str, dict[str, Any]] = {
    ", ".join(f"{SAID[name]} {value:g}" for name, value in values.items()): {
        f"{part}.{name}": value
        for part in ("distilling", "doubtful", "unsure")
        for name, value in values.items()
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
    """`auto` with each of `STEPS` in turn, on one draw."""
    one = replace(size, draws=1)
    for attack in UNFITTED:
        where = {"data": "cifar10", "attack": attack}
        methods = dict.fromkeys(STEPS, "auto")
        yield from lines(one, where, one.models(attack), methods, settings=STEPS)


def data(size: Profile) -> Iterable[Row]:
    """`auto` with fewer images, and with images that the model was not trained on."""
    one = replace(size, draws=1, test_images=size.test_images or 5000)
    parts: tuple[tuple[int, Part], ...] = ((500, "train"), (100, "train"), (500, "test"))
    for attack in (*ATTACKS, "clean"):
        for images, part in parts:
            where = {"data": "cifar10", "attack": attack, "images": images, "part": part}
            given: dict[str, Any] = {"images": images, "part": part}
            yield from lines(one, where, one.models(attack), {"auto": "auto"}, **given)
