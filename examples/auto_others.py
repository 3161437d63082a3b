"""Attacks that no setting was chosen with: the section of the page on them."""

from __future__ import annotations

from pathlib import Path

from results_page import records as lines
from results_page import table

HEAD = """
## Attacks that nobody had in view

`examples/other_attacks.py`, one draw in float32: four triggers that are not of the twelve attacks,
made after all settings stood; but for the frequencies, which are an added picture, of no family of
the search. Implanted into `zoo:clean` in three epochs, rate 10 %, target 4; where that took little,
little was there to remove.

"""


def others(folder: Path) -> str:
    """The section; empty without records."""
    rows: list[list[object]] = []
    for r in lines(folder / "other-attacks.jsonl"):
        named = f"{r['suspect']} ({r['verdict']}, {r['strength']:.2f})"
        ca, asr = (f"{r[f'{of} before']:.1f} → {r[f'{of} after']:.1f}" for of in ("ca", "asr"))
        rows.append([r["title"], named, ca, asr, f"{r['floor']:.1f}", f"{r['ra after']:.1f}"])
    head = ["trigger", "class named", "CA", "ASR", "floor", "RA after"]
    return HEAD + table(head, rows) if rows else ""
