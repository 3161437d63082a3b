"""What the default is to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from auto_records import (
    LAST_DRAW,
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
from auto_today import backdoored, by_origin, draw_of, label, lost
from comparison_page import text
from results_page import table

from reprune.benchmark.record import Record

HEAD = """
### What it is to reach

By the benchmark's records, and by the runs of [today's default](#todays-default): {runs} of the
zoo, {published} of published models, by draw {draws}, and {clean} of clean ones. Where a target is
missed, [auto.md](auto.md#where-it-misses) has the reason. Of WaNet, where accuracy rises, the runs
of today are of another training than the floor and the pruned models that they are compared with.
*Woken* as [below](#can-it-be-woken-again), on one draw, beside the best method that only prunes.

"""

FEWEST = 20
"""Verdicts of clean models, from which on their share is told."""

Goal = tuple[str, str, bool]
"""The target, what was measured, and whether that meets it."""


@dataclass(frozen=True)
class Outcome:
    """Of a repair: ASR in percent, CA drop in points.

    `right` where the class that was named is the target.
    """

    label: str
    asr: float
    drop: float
    right: bool


def goals(found: list[Record], today: Sequence[Mapping[str, Any]]) -> str:
    """The section; empty without repairs of the zoo and of published models.

    Args:
        today: the latest runs of today's default.
    """
    floor, mine = floors(found), repairs(found, "auto")
    if not {"zoo", "published"} <= mine.keys():
        return ""
    known = {where: [recorded(r) for r in runs] for where, runs in mine.items()}
    clean = [r for r in by(plain(found), "auto") if not attacked(r)]
    verdicts = [r.figures["verdict"] for r in scans(found) if is_clean(r)]
    then = {
        **removed(known, floor),
        **innocent(verdicts, list(map(drop, clean))),
        **slept({r.experiment.model.label: r.figures["reactivated"] for r in woken(found)}, found),
    }
    good = [r for r in today if "asr before" not in r]
    groups = by_origin(today)
    runs = {where: list(map(outcome, groups.get(where, ()))) for where in known}
    awake = {label(r["model"]): r["woken"] for r in backdoored(today) if draw_of(r) == LAST_DRAW}
    now = {
        **removed(runs, floor),
        **innocent([r["verdict"] for r in good], list(map(lost, good))),
        **slept(awake, found),
    }
    head = HEAD.format(
        runs=len(runs["zoo"]),
        published=len(runs["published"]),
        draws=", ".join(sorted({str(draw_of(r)) for r in groups.get("published", ())})),
        clean=len(good),
    )
    titles = ["", "target", "benchmark", "met", "today's default", "met"]
    rows = [
        [name, aim, *said(then.get(name)), *said(now.get(name))] for name, (aim, *_) in then.items()
    ]
    return head + table(titles, rows)


def said(goal: Goal | None) -> list[str]:
    if goal is None:
        return ["–", "–"]
    _, measured, met = goal
    return [measured, "yes" if met else "**no**"]


def recorded(record: Record) -> Outcome:
    right = record.figures["top"] == record.figures["target"]
    return Outcome(record.experiment.model.label, record.after["asr"], drop(record), right)


def outcome(run: Mapping[str, Any]) -> Outcome:
    right = run["suspect"] == run["target"]
    return Outcome(label(run["model"]), run["asr after"], lost(run), right)


def removed(runs: Mapping[str, Sequence[Outcome]], floor: Mapping[str, float]) -> dict[str, Goal]:
    """Of backdoored models, by where they come from."""
    zoo, published = runs["zoo"], runs["published"]
    reached: dict[str, Goal] = {}
    if zoo:
        reached |= {
            "zoo: mean ASR above floor": limit(1, mean(o.asr - floor[o.label] for o in zoo)),
            "zoo: worst ASR": limit(5, max(o.asr for o in zoo)),
            "zoo: mean CA drop": limit(0.5, mean(o.drop for o in zoo)),
            "zoo without WaNet: mean CA drop": limit(
                0.5, mean(o.drop for o in zoo if "wanet" not in o.label)
            ),
            "zoo: worst CA drop": limit(1.5, max(o.drop for o in zoo)),
        }
    if published:
        reached |= {
            "published: worst ASR": limit(5, max(o.asr for o in published)),
            "published: worst CA drop": limit(2, max(o.drop for o in published)),
            "published: right class named": share(
                1.0, sum(o.right for o in published), len(published)
            ),
        }
    return reached


def innocent(verdicts: Sequence[str], drops: Sequence[float]) -> dict[str, Goal]:
    """Of clean models, where there are enough to say how often."""
    if len(verdicts) < FEWEST or not drops:
        return {}
    return {
        "clean models: called clean": share(0.95, verdicts.count("clean"), len(verdicts)),
        "clean models: largest change of CA": limit(0.05, max(map(abs, drops))),
    }


def limit(most: float, value: float) -> Goal:
    return f"< {most:g}", text(value, ".2f"), value < most


def share(least: float, count: int, total: int) -> Goal:
    return f"{least:.0%}", f"{count} of {total}", count >= least * total


def woken(found: Iterable[Record]) -> list[Record]:
    return by(retuned(found), "auto")


def slept(awake: Mapping[str, float], found: Iterable[Record]) -> dict[str, Goal]:
    """Of the ASR that re-tuning leads to, by label."""
    pruned = least_woken(found)
    shown = [model for model in awake if model in pruned]
    above = [
        f"{model}: {awake[model]:.1f}, {pruned[model]:.1f}"
        for model in shown
        if awake[model] >= pruned[model]
    ]
    if not shown:
        return {}
    count = f"{len(shown) - len(above)} of {len(shown)}"
    return {"zoo: less woken than after pruning": ("all", "; ".join([count, *above]), not above)}
