"""What the default is to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from auto_records import (
    attacked,
    by,
    came_from,
    drop,
    floors,
    is_clean,
    least_woken,
    plain,
    repairs,
    retuned,
    scans,
)
from auto_today import draw_of, label, lost
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

MEAN_ASR, WORST_ASR = "zoo: mean ASR above floor", "zoo: worst ASR"
MEAN_DROP, WORST_DROP = "zoo: mean CA drop", "zoo: worst CA drop"
OTHERS_DROP = "zoo without WaNet: mean CA drop"
PUBLISHED_ASR, PUBLISHED_DROP = "published: worst ASR", "published: worst CA drop"
RIGHT = "published: right class named"
CALLED, CHANGED = "clean models: called clean", "clean models: largest change of CA"
LESS_WOKEN = "zoo: less woken than after pruning"

FEWEST = 20
"""Verdicts of clean models, from which on their share is told."""

Cell = tuple[str, bool]
"""What was measured, and whether that meets the target."""


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
    done = [r for r in today if "asr before" in r]
    runs = {where: [outcome(r) for r in done if origin(r) == where] for where in known}
    now = {
        **removed(runs, floor),
        **innocent([r["verdict"] for r in good], list(map(lost, good))),
        **slept({label(r["model"]): r["woken"] for r in done if draw_of(r) == draw(found)}, found),
    }
    targets = {
        MEAN_ASR: "< 1",
        WORST_ASR: "< 5",
        MEAN_DROP: "< 0.5",
        OTHERS_DROP: "< 0.5",
        WORST_DROP: "< 1.5",
        PUBLISHED_ASR: "< 5",
        PUBLISHED_DROP: "< 2",
        RIGHT: "100%",
        CALLED: "95%",
        CHANGED: "< 0.05",
        LESS_WOKEN: "all",
    }
    head = HEAD.format(
        runs=len(runs["zoo"]),
        published=len(runs["published"]),
        draws=", ".join(sorted({str(draw_of(r)) for r in done if origin(r) == "published"})),
        clean=len(good),
    )
    titles = ["", "target", "benchmark", "met", "today's default", "met"]
    rows = [[name, aim, *said(then, name), *said(now, name)] for name, aim in targets.items()]
    return head + table(titles, rows)


def said(cells: Mapping[str, Cell], name: str) -> list[str]:
    if name not in cells:
        return ["–", "–"]
    measured, met = cells[name]
    return [measured, "yes" if met else "**no**"]


def recorded(record: Record) -> Outcome:
    right = record.figures["top"] == record.figures["target"]
    return Outcome(record.experiment.model.label, record.after["asr"], drop(record), right)


def outcome(run: Mapping[str, Any]) -> Outcome:
    right = run["suspect"] == run["target"]
    return Outcome(label(run["model"]), run["asr after"], lost(run), right)


def origin(run: Mapping[str, Any]) -> str:
    return came_from(label(run["model"]))


def removed(runs: Mapping[str, Sequence[Outcome]], floor: Mapping[str, float]) -> dict[str, Cell]:
    """Of backdoored models, by where they come from."""
    zoo, published = runs["zoo"], runs["published"]
    cells: dict[str, Cell] = {}
    if zoo:
        cells |= {
            MEAN_ASR: limit(1, mean(o.asr - floor[o.label] for o in zoo)),
            WORST_ASR: limit(5, max(o.asr for o in zoo)),
            MEAN_DROP: limit(0.5, mean(o.drop for o in zoo)),
            OTHERS_DROP: limit(0.5, mean(o.drop for o in zoo if "wanet" not in o.label)),
            WORST_DROP: limit(1.5, max(o.drop for o in zoo)),
        }
    if published:
        cells |= {
            PUBLISHED_ASR: limit(5, max(o.asr for o in published)),
            PUBLISHED_DROP: limit(2, max(o.drop for o in published)),
            RIGHT: share(1.0, sum(o.right for o in published), len(published)),
        }
    return cells


def innocent(verdicts: Sequence[str], drops: Sequence[float]) -> dict[str, Cell]:
    """Of clean models, where there are enough to say how often."""
    if len(verdicts) < FEWEST or not drops:
        return {}
    return {
        CALLED: share(0.95, verdicts.count("clean"), len(verdicts)),
        CHANGED: limit(0.05, max(map(abs, drops))),
    }


def limit(most: float, value: float) -> Cell:
    return text(value, ".2f"), value < most


def share(least: float, count: int, total: int) -> Cell:
    return f"{count} of {total}", count >= least * total


def woken(found: Iterable[Record]) -> list[Record]:
    return by(retuned(found), "auto")


def draw(found: Iterable[Record]) -> int:
    """The draw on whose repairs models were re-tuned."""
    return max(r.experiment.draw for r in woken(found))


def slept(awake: Mapping[str, float], found: Iterable[Record]) -> dict[str, Cell]:
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
    return {LESS_WOKEN: ("; ".join([count, *above]), not above)}
