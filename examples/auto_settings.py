"""How settings of the default compare, and whether one is better without an attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import mean, stdev
from typing import Any

from auto_records import chosen, drop, least_woken, models, retuned, usual
from comparison_page import text
from results_page import table

from reprune.benchmark.default import RECOVERY, SETTINGS
from reprune.benchmark.profiles import SMALL
from reprune.benchmark.record import Record
from reprune.precision import Precision

HEAD = """
## The settings of the {what}

{attacks} attacks, one draw, in {precision}, {settings} settings that share a scan (`{table}`): the
default and what differs from it: {differs}. *Woken* is the ASR after the repaired model was
re-tuned as in the [section on that](#can-it-be-woken-again), *above* on how many attacks that is
not below what it is after the best method that only prunes. *Cost* is ASR plus CA drop; beside the
default's, with the standard error over the attacks.

"""

CHOICE = """
The rule: first is, of the settings with the fewest attacks *above*, that with the lowest cost; the
default stands unless that is lower by more than {errors:g} standard errors. On all attacks the
first is *{lowest}*, and chosen is *{chosen}*. Below, each attack is left out of the choice in turn;
what is left of it: ASR (woken), CA drop.

"""

DEFAULT = "the default"

ERRORS = 2.0
"""Standard errors that a difference must exceed."""


@dataclass(frozen=True)
class Comparison:
    """A table of settings: what they are of, what differs in words, and in which precision."""

    what: str
    table: str
    settings: Mapping[str, Mapping[str, Any]]
    differs: str
    precision: Precision


OF_REPAIR = Comparison(
    what="repair",
    table="auto-settings",
    settings=SETTINGS,
    differs="how deep the lessons go (0.5: the last half of the layers), the weights of mixtures "
    "of two clean images, of repelling and of triggers, how much of what clean images use may "
    "move (ridge), steps, temperature, and the first rate",
    precision=SMALL.precision,
)
OF_RECOVERY = Comparison(
    what="recovery and of the guard",
    table="auto-recovery",
    settings=RECOVERY,
    differs="how many times a trigger is exaggerated at most, one trigger of each kind that "
    "teaches, patches alone, without pictures, warps and filters, and a guard of 2 points of "
    "accuracy instead of 5",
    precision="float32",
)


@dataclass(frozen=True)
class Left:
    """What a repair left of one attack, in percent and points; `above` is explained in `HEAD`."""

    asr: float
    lost: float
    woken: float
    above: bool

    @property
    def cost(self) -> float:
        return self.asr + self.lost

    def __str__(self) -> str:
        return f"{self.asr:.1f} ({self.woken:.1f}), {self.lost:+.1f}"


Runs = Mapping[str, Mapping[str, Left]]
"""What is left by setting and attack."""


def settings(found: list[Record], comparison: Comparison = OF_REPAIR) -> str:
    """The section, on the attacks that every setting with records was tried on; empty on one."""
    runs = left_by(found, comparison)
    tried = [set(some) for some in runs.values()]
    attacks = [a for a in runs.get(DEFAULT, ()) if all(a in some for some in tried)]
    if len(attacks) < 2:
        return ""
    runs = {name: {a: some[a] for a in attacks} for name, some in runs.items()}
    said = HEAD.format(
        what=comparison.what,
        table=comparison.table,
        differs=comparison.differs,
        precision=comparison.precision,
        attacks=len(attacks),
        settings=len(runs),
    )
    lowest = first(runs, attacks)
    choice = CHOICE.format(errors=ERRORS, lowest=lowest, chosen=stands(runs, lowest, attacks))
    return said + compared(runs, attacks) + choice + left_out(runs, attacks)


def left_by(found: list[Record], comparison: Comparison) -> Runs:
    pruned, every = least_woken(usual(found)), retuned(found)
    runs: dict[str, dict[str, Left]] = {}
    for name, own in comparison.settings.items():
        mine = chosen(every, method="auto", settings=own, precision=comparison.precision)
        by = {r.experiment.model.label: r for r in mine}
        for model in models(mine):
            after, awake = by[model].after["asr"], by[model].figures["reactivated"]
            left = Left(after, drop(by[model]), awake, awake >= pruned.get(model, inf))
            runs.setdefault(name, {})[model] = left
    return runs


def compared(runs: Runs, attacks: Sequence[str]) -> str:
    head = ["", "mean ASR", "worst ASR", "mean CA drop", "worst CA drop", "mean woken", "above"]
    rows: list[list[object]] = [
        [
            name,
            *(text(of_all(x.asr for x in some.values())) for of_all in (mean, max)),
            *(text(of_all(x.lost for x in some.values())) for of_all in (mean, max)),
            text(mean(x.woken for x in some.values())),
            sum(x.above for x in some.values()),
            beside(runs, name, attacks),
        ]
        for name, some in runs.items()
    ]
    return table([*head, "cost"], rows)


def difference(runs: Runs, name: str, attacks: Sequence[str]) -> tuple[float, float]:
    """Of the cost from the default's, with its standard error."""
    values = [runs[name][a].cost - runs[DEFAULT][a].cost for a in attacks]
    return mean(values), stdev(values) / sqrt(len(values))


def beside(runs: Runs, name: str, attacks: Sequence[str]) -> str:
    value, error = difference(runs, name, attacks)
    return "–" if name == DEFAULT else f"{value:+.2f} ± {error:.2f}"


def first(runs: Runs, attacks: Sequence[str]) -> str:
    """Fewest attacks above, then lowest cost."""

    def rank(name: str) -> tuple[int, float]:
        some = [runs[name][attack] for attack in attacks]
        return sum(x.above for x in some), mean(x.cost for x in some)

    return min(runs, key=rank)


def stands(runs: Runs, name: str, attacks: Sequence[str]) -> str:
    """The setting if it is clearly better than the default, else the default."""
    value, error = difference(runs, name, attacks)
    return name if value < -ERRORS * error else DEFAULT


def left_out(runs: Runs, attacks: Sequence[str]) -> str:
    rows: list[list[object]] = []
    for attack in attacks:
        others = [other for other in attacks if other != attack]
        lowest = first(runs, others)
        kept = stands(runs, lowest, others)
        rows.append(
            [attack, lowest, beside(runs, lowest, others), kept]
            + [runs[name][attack] for name in (kept, DEFAULT)]
        )
    head = ["attack", "first without it", "cost", "chosen", "which leaves", "the default leaves"]
    return table(head, rows)
