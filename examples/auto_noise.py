"""What searches for noise of each image and for filters would add: the section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from noise_search import FAMILIES
from results_page import records as lines
from results_page import table

from reprune.detection.evidence import lower_quartile

HEAD = """
## Searches that are not in the default

`examples/noise_search.py`, one draw in float32: noise that a small network draws from each image,
and 5 x 5 filters, which the scan seeks on a second look only, in the model alone. The class that
the smallest one leads to, how many times as much the next class takes, and its share of the lower
quartile over the classes. `auto` uses neither so: no bound is set.

"""

REPAIR = """
A small VGG with a backdoor of LIRA whose noise may be three times the paper's, and which half took
(CA {ca:.1f}, ASR {asr:.1f}). The scan says "{verdict}" ({strength:.2f}). If the repair is told the
target class, what it does by kinds of triggers, of the model alone, that teach:

"""


def noise(folder: Path) -> str:
    """The section; empty without records."""
    found = lines(folder / "noise-search.jsonl")
    searched = [r for r in found if r["part"] == "sizes"]
    if not searched:
        return ""
    rows = []
    for model in dict.fromkeys(r["model"] for r in searched):
        mine = {r["family"]: r for r in searched if r["model"] == model}
        target = next(iter(mine.values()))["target"]
        named = [_named(mine[family]) if family in mine else "–" for family in FAMILIES]
        rows.append([model, "–" if target is None else target, *named])
    page = HEAD + table(["model", "target", *FAMILIES], rows)
    repaired = [r for r in found if r["part"] == "repair"]
    if not repaired:
        return page
    first = repaired[0]
    page += REPAIR.format(
        ca=first["ca before"],
        asr=first["asr before"],
        verdict=first["verdict"],
        strength=first["strength"],
    )
    return page + table(
        ["taught by", "triggers", "CA", "ASR", "RA"],
        [
            [
                r["title"],
                r["lessons"],
                *(f"{r[f'{rate} after']:.1f}" for rate in ("ca", "asr", "ra")),
            ]
            for r in repaired
        ],
    )


def _named(record: Mapping[str, Any]) -> str:
    sizes = [inf if size is None else size for size in record["sizes"]]
    (first, label), (second, _) = sorted((size, k) for k, size in enumerate(sizes))[:2]
    known = [size for size in sizes if size < inf]
    if len(known) < 2:
        return "–"
    share = first / lower_quartile(known)
    return f"{label} ({first:.1f}; {second / first:.1f} times; {share:.2f})"
