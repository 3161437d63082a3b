"""What the default does today: a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from auto_others import named
from auto_records import ORIGINS, came_from, drop, floors, repairs
from comparison_page import text
from results_page import records as lines
from results_page import table

from reprune.benchmark.record import Record

HEAD = """
### Today's default

`examples/default.py`, in float32, by draw of the images; nobody tells it anything. Everything that
the benchmark's records are from before is in it. Models of the recipes are other trainings than the
benchmark's. *Woken* is the ASR after re-tuning as [below](#can-it-be-woken-again), *recalibrated*
whether batch norms were ([why not](#what-batch-norms-do)).

"""

SHORT = """
Averages of these, where there are several, beside the benchmark's records of the same runs.

"""


AVERAGES = ["", "draws", "runs", "mean ASR", "mean ASR above floor", "worst ASR", "mean CA drop"]
AVERAGES += ["worst CA drop", "mean woken"]


def today(folder: Path, before: list[Record]) -> str:
    """The section, beside what the benchmark knew `before`; empty without records."""
    every = sorted(lines(folder / "default.jsonl"), key=lambda r: (r["model"], draw_of(r)))
    found = [r for r in every if "asr before" in r]
    if not found:
        return ""
    by_origin = {
        where: [r for r in found if came_from(label(r["model"])) == where] for where in ORIGINS
    }
    floor, knew = floors(before), repairs(before, "auto")
    head = ["model", "draws", "target", "class named", "CA", "ASR", "RA after", "woken"]
    head += ["recalibrated"]
    rows = [
        row(list(runs))
        for mine in by_origin.values()
        for _, runs in groupby(mine, key=lambda r: r["model"])
    ]
    shorts = [
        line
        for where, mine in by_origin.items()
        for runs in by_draw(mine)
        for line in short(where, runs, knew.get(where, []), floor)
    ]
    averaged = SHORT + table(AVERAGES, shorts) if shorts else ""
    return HEAD + table(head, rows) + averaged + clean([r for r in every if r not in found])


def clean(found: Sequence[Mapping[str, Any]]) -> str:
    """Of models without a backdoor; empty without any."""
    names = ", ".join(f"{r['model']} ({r['verdict']}, {r['strength']:.2f})" for r in found)
    return f"\nModels without a backdoor: {names}.\n" if found else ""


def label(name: str) -> str:
    """The label that the benchmark would give to a model of this name."""
    return name if name.startswith("zoo:") else f"models:{name}"


def row(runs: Sequence[Mapping[str, Any]]) -> list[object]:
    """Of one model, draw by draw."""

    def each(name: str, form: str = ".1f") -> str:
        return ", ".join(format(r[name], form) for r in runs)

    first = runs[0]
    return [
        first["model"],
        ", ".join(str(draw_of(r)) for r in runs),
        "all" if first["target"] is None else first["target"],
        ", ".join(map(named, runs)),
        f"{first['ca before']:.1f} → {each('ca after')}",
        f"{first['asr before']:.1f} → {each('asr after')}",
        each("ra after"),
        each("woken"),
        ", ".join(map(recalibrated, runs)),
    ]


def draw_of(record: Mapping[str, Any]) -> int:
    return int(record.get("draw", 0))


def by_draw(found: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The runs of each draw, and where there are several those of all."""
    every = sorted(found, key=draw_of)
    draws = [list(runs) for _, runs in groupby(every, key=draw_of)]
    return [*draws, every] if len(draws) > 1 else draws


def short(
    where: str,
    found: Sequence[Mapping[str, Any]],
    before: list[Record],
    floor: Mapping[str, float],
) -> list[list[object]]:
    """Averages over runs, and those of the same in the benchmark, if it has all."""
    if len(found) < 2:
        return []
    runs = {(label(r["model"]), draw_of(r)) for r in found}
    same = [r for r in before if (r.experiment.model.label, r.experiment.draw) in runs]
    draw = ", ".join(str(k) for k in sorted({draw_of(r) for r in found}))
    now = [(label(r["model"]), r["asr after"], r["ca before"] - r["ca after"]) for r in found]
    then = [(r.experiment.model.label, r.after["asr"], drop(r)) for r in same]
    rows = [[where, draw, *averages(now, floor), text(mean(r["woken"] for r in found))]]
    if len(same) == len(found) and where in ("zoo", "published"):
        rows.append([f"{where}, benchmark", draw, *averages(then, floor), "–"])
    return rows


def averages(runs: Sequence[tuple[str, float, float]], floor: Mapping[str, float]) -> list[object]:
    """Of labels, ASR and CA drops: how many, means and worst."""
    names, rates, drops = zip(*runs, strict=True)
    above = [asr - floor[label] for label, asr, _ in runs] if {*names} <= floor.keys() else []
    return [
        len(runs),
        text(mean(rates), ".2f"),
        text(mean(above) if above else None, ".2f"),
        text(max(rates), ".2f"),
        text(mean(drops), ".2f"),
        text(max(drops), ".2f"),
    ]


def recalibrated(record: Mapping[str, Any]) -> str:
    """Whether batch norms were recalibrated, as the notes tell."""
    said = [note for note in record["notes"] if note.startswith("batch norms")]
    return "yes" if any(note.endswith("they are taken") for note in said) else "no" if said else "–"
