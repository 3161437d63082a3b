"""What pictures that a repaired copy still follows teach: a section of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_mixtures import cell
from auto_today import backdoored, draw_of, images, latest, lost, run_of, tested
from results_page import table

HEAD = """
### Pictures in the copy

A copy that the judges are content with is searched for added pictures, too, sharp and smooth: those
that lead to a suspect and are smaller than what innocent classes of the model needed (the median)
teach once more. The
runs of [today's default](#todays-default) are from before that, but not from before anything else.
The same models and draws with it, by `examples/default.py`: CA / ASR after, in brackets the ASR
after re-tuning as [below](#can-it-be-woken-again). *Found* says in how many squared pixels; where
nothing was found, the repair is the one before.

"""

FOUND = re.compile(r"\d+ (filter|additive|smooth) from ([\d.]+) squared pixels")


def looks(folder: Path) -> str:
    """The section; empty without records."""
    before = {run_of(r): r for r in latest(folder)}
    rows = [
        [
            r["model"],
            draw_of(r),
            images([r]) if tested(r) == tested(old) else f"{images([old])}, {images([r])}",
            found(r),
            f"{r['ca before']:.1f} / {r['asr before']:.1f}",
            cell(old, " after"),
            cell(r, " after"),
            f"{lost(old):.1f}, {lost(r):.1f}",
        ]
        for r in backdoored(latest(folder, "looks"))
        if (old := before.get(run_of(r)))
    ]
    if not rows:
        return ""
    head = ["model", "draw", "tested", "found", "as it came", "without", "with", "CA drops"]
    return HEAD + table(head, rows)


def found(record: Mapping[str, Any]) -> str:
    """What led the copy to a suspect, as the notes tell."""
    said = [kind for note in record["notes"] for kind in FOUND.findall(note)]
    return ", ".join(f"{family} {size}" for family, size in said) or "–"
