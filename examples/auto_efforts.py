"""What less and more effort of the default does, and what it does within a time limit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_cost import unlearns
from auto_others import done
from auto_records import IMAGES, chosen, models, of
from results_page import records as lines
from results_page import table

from reprune.benchmark.default import EFFORTS
from reprune.benchmark.record import Record

HEAD = """
## Less and more effort

One draw, in {precision}: CA / ASR after, in brackets the ASR after re-tuning as above; the seconds
that a run took where it had one thread of a processor.

"""

LIMITS = """
### With a time limit

`examples/time_limits.py`, one draw in float32, on one thread. A limit is in training epochs on the
defence images, timed before each run; without one, a run that unlearns copies takes some
{usual:.0f} on ten classes ([cost](#cost)). *Left out* is what the limit kept it from: searches of
the scan, as the model was suspicious already, kinds of triggers, lessons, or a verdict. The model
came back after {longest:.2f} times the limit at most.

"""


def efforts(found: list[Record]) -> str:
    """The section, in the precision that most runs of other efforts had; empty without any."""
    runs = chosen(found, task="removal", settings={}, draw=0, images=IMAGES, part="train")
    runs = [r for r in runs if r.experiment.method in EFFORTS and "reactivated" in r.figures]
    others = [r for r in runs if r.experiment.method != "auto"]
    if not others:
        return ""
    precisions = [r.experiment.precision for r in others]
    precision = max(set(precisions), key=precisions.count)
    runs = chosen(runs, precision=precision)
    rows: list[list[object]] = [
        [model, *(cell(chosen(of(runs, model), method=name)) for name in EFFORTS)]
        for model in models(chosen(others, precision=precision))
    ]
    return HEAD.format(precision=precision) + table(["", *(f"`{name}`" for name in EFFORTS)], rows)


def cell(found: list[Record]) -> str:
    if not found:
        return "–"
    record = found[0]
    woken = record.figures["reactivated"]
    said = f"{record.after['ca']:.1f} / {record.after['asr']:.1f} ({woken:.1f})"
    if record.seconds is None or not record.made["hardware"].endswith("1 thread"):
        return said
    return f"{said}, {record.seconds:.0f} s"


def limits(folder: Path) -> str:
    """The section; empty without records."""
    found = lines(folder / "time-limits.jsonl")
    if not found:
        return ""
    costs = [r for r in lines(folder / "methods-cost.jsonl") if r["method"] == "auto"]
    usual = [r for r in costs if unlearns(r)]
    longest = max(r["seconds"] / (r["limit"] * r["epoch seconds"]) for r in found)
    head = ["model", "limit", "class named", "CA", "ASR", "RA after", "left out"]
    page = LIMITS.format(usual=usual[-1]["time / training epoch"], longest=longest)
    return page + table(
        head, [[r["model"], f"{r['limit']:.0f}", *done(r), _left_out(r)] for r in found]
    )


def _left_out(record: Mapping[str, Any]) -> str:
    notes = " ".join(record["notes"])
    if "before there was a verdict" in notes:
        return "a verdict"
    said = {
        "searches": "no time for all searches",
        "triggers": "no time for all kinds of triggers",
        "lessons": "ended the lessons",
    }
    return ", ".join(what for what, words in said.items() if words in notes) or "–"
