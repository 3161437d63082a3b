"""Which experiments show what the default method, `auto`, does, and what its steps are good for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from reprune.benchmark.papers import ATTACKS, lines, woken
from reprune.benchmark.profiles import Profile
from reprune.benchmark.spec import Part
from reprune.benchmark.table import Row
from reprune.defenses.trigger_bank import SEARCHES

SHOWN = ("cl", "dynamic", "awp", "a-blend")
"""Attacks that steps and efforts are shown on."""

EFFORTS = ("auto:low", "auto", "auto:high")
"""What `--effort` chooses from."""

STEPS: dict[str, dict[str, Any]] = {
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
    "last half": {"distilling.depth": 0.5},
    "no mixtures": {"distilling.mixed": 0.0},
    "nothing repelled": {"distilling.repelled": 0.0},
}
"""Settings with one step left out or done in a plainer way, by what is changed."""

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

CANDIDATES: list[Mapping[str, float]] = [
    {},
    {"depth": 0.5, "mixed": 0.0, "repelled": 0.0},
    *({"depth": 1.0, "mixed": mixed, "repelled": 0.0} for mixed in (1.0, 3.0)),
    *({"repelled": repelled} for repelled in (0.25, 1.0)),
    {"mixed": 1.0},
    {"depth": 0.5},
    *({"ridge": ridge} for ridge in (0.03, 0.3)),
    *({"steps": steps} for steps in (64, 256)),
    *({"temperature": temperature} for temperature in (1.0, 4.0)),
    *({"weight": weight} for weight in (0.5, 2.0)),
]

RATES = ((0.015, 0.1), (0.06, 0.1))
"""Other rates than the default's."""

SETTINGS: dict[str, dict[str, Any]] = {
    ", ".join(f"{SAID[name]} {value:g}" for name, value in values.items()) or "the default": {
        f"distilling.{name}": value for name, value in values.items()
    }
    for values in CANDIDATES
} | {f"rate {first:g}": {"rates": [first, second]} for first, second in RATES}
"""Settings of the repair among which the default is chosen, by name."""


RECOVERY: dict[str, dict[str, Any]] = {
    "the default": {},
    "exaggerated 1": {"search.strongest": 1.0},
    "exaggerated 3": {"search.strongest": 3.0},
    "one lesson": {"search.lessons": 1},
    "patches only": STEPS["patches only"],
    "guard 0.02": {"max_accuracy_drop": 0.02},
}
"""Settings of the recovery and of the guard among which the default is chosen, by name."""


def among(settings: dict[str, dict[str, Any]]) -> Callable[[Profile], Iterable[Row]]:
    """`auto` with each of these, on all attacks and one draw, and what five images wake."""

    def rows(size: Profile) -> Iterable[Row]:
        methods = dict.fromkeys(settings, "auto")
        for attack in ATTACKS:
            where = {"data": "cifar10", "attack": attack}
            every = lines(size, where, size.models(attack), methods, settings=settings)
            yield from map(woken, every)

    return rows


def steps(size: Profile) -> Iterable[Row]:
    """`auto` with each of `STEPS`, on one draw."""
    one = replace(size, draws=1)
    for attack in SHOWN:
        where = {"data": "cifar10", "attack": attack}
        methods = dict.fromkeys(STEPS, "auto")
        yield from lines(one, where, one.models(attack), methods, settings=STEPS)


def efforts(size: Profile) -> Iterable[Row]:
    """`EFFORTS` on one draw."""
    one = replace(size, draws=1)
    for attack in SHOWN:
        where = {"data": "cifar10", "attack": attack}
        methods = {name: name for name in EFFORTS}
        yield from map(woken, lines(one, where, one.models(attack), methods))


def data(size: Profile) -> Iterable[Row]:
    """`auto` with fewer images, and with images that the model has not seen."""
    one = replace(size, draws=1, test_images=size.test_images or 5000)
    parts: tuple[tuple[int, Part], ...] = ((500, "train"), (100, "train"), (500, "test"))
    for attack, (images, part) in product((*ATTACKS, "clean"), parts):
        where = {"data": "cifar10", "attack": attack, "images": images, "part": part}
        given: dict[str, Any] = {"images": images, "part": part}
        yield from lines(one, where, one.models(attack), {"auto": "auto"}, **given)
