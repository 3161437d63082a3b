"""What batch norms do after a repair: a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from auto_mixtures import cells
from recalibration import RECALIBRATED, TAUGHT
from results_page import records as lines
from results_page import table

HEAD = """
### What batch norms do

`examples/recalibration.py`, one draw in float32; the repair is told the target class, and taught by
kinds of triggers that are sought in the model alone. *Recalibrated*, its batch norms give clean
images the mean and variance that those of the original do
([why](auto-design.md)). CA / ASR after, in brackets the ASR after re-tuning as below. *Taken* says
whether `auto` would have, by its first rule: where that saves no accuracy on held-out images, or
the triggers put aside move more of them, it did not. Now it does not where that does not lower the
Brier score of held-out images, or the triggers put aside move more of them than before and than the
model leads to a class by mistake ([what it takes now](#todays-default)).

"""

IN_SHORT = """
On {count} models of the zoo, as taught and as `auto` takes it: CA drop {before[0]:.2f} and
{after[0]:.2f} on average, {before[1]:.2f} and {after[1]:.2f} at worst; ASR {before[2]:.2f} and
{after[2]:.2f} on average, {before[3]:.2f} and {after[3]:.2f} at worst; woken {before[4]:.1f} and
{after[4]:.1f} on average.
"""


def recalibration(folder: Path) -> str:
    """The section; empty without records."""
    found = {(r["model"], r["norms"]): r for r in lines(folder / "recalibration.jsonl")}
    pairs = [
        (found[model, TAUGHT], found[model, RECALIBRATED])
        for model in dict.fromkeys(name for name, _ in found)
    ]
    if not pairs:
        return ""
    rows: list[list[object]] = [
        [
            first["model"],
            first["target"],
            *cells(first, second),
            "yes" if first["taken"] else "no",
        ]
        for first, second in pairs
    ]
    page = HEAD + table(["model", "target", "original", TAUGHT, RECALIBRATED, "taken"], rows)
    zoo = [pair for pair in pairs if pair[0]["model"].startswith("zoo:")]
    if not zoo:
        return page
    before, after = (
        _figures([pair[took and pair[0]["taken"]] for pair in zoo]) for took in (False, True)
    )
    return page + IN_SHORT.format(count=len(zoo), before=before, after=after)


def _figures(found: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """CA drop, mean and worst; ASR, mean and worst; mean ASR after re-tuning."""
    drops, asrs = ([*values] for values in zip(*((_drop(r), r["asr"]) for r in found), strict=True))
    return fmean(drops), max(drops), fmean(asrs), max(asrs), fmean(r["woken"] for r in found)


def _drop(record: Mapping[str, Any]) -> float:
    return float(record["ca before"] - record["ca"])
