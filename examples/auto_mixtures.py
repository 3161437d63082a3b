"""What mixtures of clean images teach: a section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtures import RULES
from results_page import records as lines
from results_page import table

HEAD = """
### What mixtures teach

`examples/mixtures.py`, one draw in float32; the repair is told the target class. A model may lead
mixtures to the class of its backdoor, for they may look triggered: *led* is the share that it leads
there of those none of whose images it sees there. Taught *as answered*, which is how the
benchmark's records were made, they keep some of it. Today that class is *no likelier* than for
either image. CA / ASR after, in brackets the ASR after re-tuning as below. The rule was found on
`gtsrb-resnet18-wanet`, one of the set aside recipes, trained anew.

"""


def mixtures(folder: Path) -> str:
    """The section; empty without records."""
    found = {(r["model"], r["rule"]): r for r in lines(folder / "mixtures.jsonl")}
    rows: list[list[object]] = []
    for model in dict.fromkeys(name for name, _ in found):
        first = found[model, RULES[0]]
        rows.append(
            [
                model,
                first["target"],
                f"{100 * first['led']:.1f} %",
                *cells(*(found[model, rule] for rule in RULES)),
            ]
        )
    return HEAD + table(["model", "target", "led", "original", *RULES], rows) if rows else ""


def cells(*repairs: Mapping[str, Any]) -> list[str]:
    """CA / ASR of a model, and after each of its repairs; in brackets the ASR after re-tuning."""
    first = repairs[0]
    return [f"{first['ca before']:.1f} / {first['asr before']:.1f}", *map(cell, repairs)]


def cell(record: Mapping[str, Any], when: str = "") -> str:
    """CA / ASR of a repaired model, in brackets the ASR after re-tuning."""
    ca, asr = record[f"ca{when}"], record[f"asr{when}"]
    return f"{ca:.1f} / {asr:.1f} ({record['woken']:.1f})"
