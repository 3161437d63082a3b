"""What the default is to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from auto_records import (
    attacked,
    by,
    drop,
    floors,
    is_clean,
    least_woken,
    plain,
    repairs,
    retuned,
    scans,
)
from comparison_page import text
from results_page import table

from reprune.benchmark.record import Record

HEAD = """
### What it is to reach

Where a target is missed, [auto.md](auto.md#where-it-misses) has the reason. *Woken* as
[below](#can-it-be-woken-again), on one draw, beside the best method that only prunes.

"""


def goals(found: list[Record]) -> str:
    """The section; empty without repairs of the zoo and of published models."""
    mine = repairs(found, "auto")
    if not {"zoo", "published"} <= mine.keys():
        return ""
    zoo, published, floor = mine["zoo"], mine["published"], floors(found)
    above = [r.after["asr"] - floor[r.experiment.model.label] for r in zoo]
    rows: list[list[object]] = [
        limit("zoo: mean ASR above floor", 1, mean(above)),
        limit("zoo: worst ASR", 5, worst(zoo)),
        limit("zoo: mean CA drop", 0.5, mean(map(drop, zoo))),
        limit("zoo: worst CA drop", 1.5, max(map(drop, zoo))),
        limit("published: worst ASR", 5, worst(published)),
        limit("published: worst CA drop", 2, max(map(drop, published))),
    ]
    right = sum(r.figures["top"] == r.figures["target"] for r in published)
    rows.append(share("published: right class named", 1.0, right, len(published)))
    verdicts = [r.figures["verdict"] for r in scans(found) if is_clean(r)]
    rows.append(share("clean models: called clean", 0.95, verdicts.count("clean"), len(verdicts)))
    clean = [r for r in by(plain(found), "auto") if not attacked(r)]
    rows.append(limit("clean models: largest change of CA", 0.05, max(abs(drop(r)) for r in clean)))
    return HEAD + table(["", "target", "measured", "met"], [*rows, slept(found)])


def worst(runs: Iterable[Record]) -> float:
    return max(r.after["asr"] for r in runs)


def limit(name: str, most: float, value: float) -> list[object]:
    return [name, f"< {most:g}", text(value, ".2f"), "yes" if value < most else "**no**"]


def share(name: str, least: float, count: int, total: int) -> list[object]:
    met = "yes" if count >= least * total else "**no**"
    return [name, f"{least:.0%}", f"{count} of {total}", met]


def slept(found: list[Record]) -> list[object]:
    pruned = least_woken(found)
    mine = by(retuned(found), "auto")
    awake = {r.experiment.model.label: r.figures["reactivated"] for r in mine}
    shown = [model for model in awake if model in pruned]
    above = [
        f"{model}: {awake[model]:.1f}, {pruned[model]:.1f}"
        for model in shown
        if awake[model] >= pruned[model]
    ]
    said = f"{len(shown) - len(above)} of {len(shown)}" + "".join(f"; {x}" for x in above)
    return ["zoo: less woken than after pruning", "all", said, "**no**" if above else "yes"]
