"""What the default does today to one draw of each model: a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from auto_others import done
from auto_records import ORIGINS, came_from, drop, repairs
from results_page import records as lines
from results_page import table

from reprune.benchmark.record import Record

HEAD = """
### Today's default, one draw

`examples/default.py`, in float32; nobody tells it anything. Everything that the benchmark's records
are from before is in it. Models of the recipes are other trainings than the benchmark's. *Woken* is
the ASR after re-tuning as [below](#can-it-be-woken-again), *recalibrated* whether batch norms were
([why not](#what-batch-norms-do)).

"""

SHORT = """
On these {count} models ({where}) the ASR is {asr[0]:.2f} on average and {asr[1]:.2f} at worst, the
CA drop {drop[0]:.2f} and {drop[1]:.2f}, *woken* {woken:.1f} on average.
"""

BEFORE = """In the benchmark's records of these models and this draw the ASR is {asr[0]:.2f} on
average and {asr[1]:.2f} at worst, the CA drop {drop[0]:.2f} and {drop[1]:.2f}.
"""


def today(folder: Path, before: list[Record]) -> str:
    """The section, beside what the benchmark knew `before`; empty without records."""
    found = sorted(
        (r for r in lines(folder / "default.jsonl") if "asr before" in r), key=lambda r: r["model"]
    )
    if not found:
        return ""
    by_origin = {
        where: [r for r in found if came_from(label(r["model"])) == where] for where in ORIGINS
    }
    head = ["model", "target", "class named", "CA", "ASR", "RA after", "woken", "recalibrated"]
    rows = [row(r) for mine in by_origin.values() for r in mine]
    shorts = [short(where, mine, before) for where, mine in by_origin.items() if len(mine) > 1]
    return HEAD + table(head, rows) + "".join(shorts)


def label(name: str) -> str:
    """The label that the benchmark would give to a model of this name."""
    return name if name.startswith("zoo:") else f"models:{name}"


def row(record: Mapping[str, Any]) -> list[object]:
    target = "all" if record["target"] is None else record["target"]
    woken = f"{record['woken']:.1f}"
    return [record["model"], target, *done(record), woken, recalibrated(record)]


def short(where: str, found: Sequence[Mapping[str, Any]], before: list[Record]) -> str:
    """Averages of some models, and those of the same runs in the benchmark, if it has all."""
    names = {label(r["model"]) for r in found}
    same = [
        r
        for r in repairs(before, "auto").get(where, [])
        if r.experiment.draw == 0 and r.experiment.model.label in names
    ]
    now = SHORT.format(
        count=len(found),
        where=where,
        **averages([(r["asr after"], r["ca before"] - r["ca after"]) for r in found]),
        woken=mean(r["woken"] for r in found),
    )
    if len(same) < len(found):
        return now
    return now + BEFORE.format(**averages([(r.after["asr"], drop(r)) for r in same]))


def averages(found: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Mean and worst of pairs of an ASR and a CA drop."""
    rates, drops = zip(*found, strict=True)
    return {"asr": (mean(rates), max(rates)), "drop": (mean(drops), max(drops))}


def recalibrated(record: Mapping[str, Any]) -> str:
    """Whether batch norms were recalibrated, as the notes tell."""
    said = [note for note in record["notes"] if note.startswith("batch norms")]
    return "yes" if any(note.endswith("they are taken") for note in said) else "no" if said else "–"
