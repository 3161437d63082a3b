"""What unlearned copies of an accused model were good for: a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from auto_mixtures import cell
from auto_records import scans
from auto_today import draw_of, tested
from auto_verdicts import signs
from results_page import records as lines
from results_page import table

from reprune.benchmark.record import Record
from reprune.detection import Scan
from reprune.detection.signs import JOINT
from reprune.results import clearly

HEAD = """
### Copies of accused models

A model that a search in it alone accuses is not unlearned any more. Of the benchmark's scans, which
are from before that, {accused} accuse a class, and {right} of these the target. Copies made
{beside} other classes suspects, of which {wrong} were wrong.
"""

COMPARED = """
What the rule changes, by `examples/default.py`, draw 0: CA / ASR after, in brackets the ASR after
re-tuning as [above](#can-it-be-woken-again). Those with copies were made by the same command before
there was the rule (commit e77e6a8). What it saves is [below](#cost).

"""

SHORT = """
On average {with_copies} with copies,
{without} without.
"""


def copies(folder: Path, found: list[Record]) -> str:
    """The section; empty without scans that accuse."""
    tried = [r for r in scans(found) if r.figures["strength"] >= 1]
    if not tried:
        return ""
    beside = [(label, r.figures["target"]) for r in tried for label in suspected(r)]
    return HEAD.format(
        accused=len(tried),
        right=sum(r.figures["top"] == r.figures["target"] for r in tried),
        beside=len(beside),
        wrong=sum(label != target for label, target in beside),
    ) + compared(folder)


def suspected(record: Record) -> set[int | None]:
    """Classes that the copies named as strongly as suspects are, and no other search."""
    seen = signs(record)
    strong = [sign for sign in seen if sign.strength >= max(Scan().clear, clearly(seen))]
    jointly = {sign.label for sign in strong if sign.search.startswith(JOINT)}
    return jointly - {sign.label for sign in strong if not sign.search.startswith(JOINT)}


def unlearned(record: Mapping[str, Any]) -> bool:
    """Whether the scan had copies."""
    return any(name.startswith(JOINT) for name, *_ in record["signs"])


def compared(folder: Path) -> str:
    """Repairs of the same models with and without copies."""
    made = [r for r in lines(folder / "default.jsonl") if draw_of(r) == 0]
    now = {(r["model"], tested(r)): r for r in made}
    pairs = [
        (old, new)
        for old in lines(folder / "copies.jsonl")
        if (new := now.get((old["model"], tested(old)))) and not unlearned(new)
    ]
    if not pairs:
        return ""
    rows = [
        [old["model"], *(cell(r, " after") for r in (old, new))]
        for old, new in sorted(pairs, key=lambda pair: str(pair[0]["model"]))
    ]
    olds, news = zip(*pairs, strict=True)
    short = SHORT.format(with_copies=mean(olds), without=mean(news))
    return COMPARED + table(["model", "with copies", "without"], rows) + short


def mean(found: Sequence[Mapping[str, Any]]) -> str:
    """Averages in words."""
    drop = fmean(r["ca before"] - r["ca after"] for r in found)
    asr, woken = (fmean(r[name] for r in found) for name in ("asr after", "woken"))
    return f"a CA drop of {drop:.2f}, an ASR of {asr:.2f} ({woken:.1f})"
