"""What the default costs, by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_records import DEFAULTS
from comparison_page import text, timed_model
from results_page import records as lines
from results_page import table

COST = """
## Cost

`benchmarks/methods.py`: passes are images through the network over the number of defence images;
time in training epochs (forward, backward, step on the same images), by step. Both scan and recover
alike; mixtures make five thirds of the passes of `distil`, through all layers instead of half. In
bfloat16 `auto:late` alone was timed. The tables of `auto:late` are from before searches called a
twin without batch norms. `zoo:badnets` is accused: its tables with a step `unlearn` are from before
such models were [no longer unlearned](#copies-of-accused-models). No search of the model alone
accuses `zoo:trojan`, so that it is unlearned. In the table of that one, and in that of
`zoo:badnets`, not unlearned, on AMD EPYC, copies are searched for
[pictures](#pictures-in-the-copy), too, as a part of `recover`: eight searches for each suspect, and
the lessons once more where they are found (here they were not); all other tables are from before.
Tables are of different commits, and of processors of a kind some are faster than others.

"""

FULL_WIDTH = """
At the papers' width, `auto:late`, all steps together, without loading:

"""


def cost(folder: Path) -> str:
    rows = [r for r in lines(folder / "methods-cost.jsonl") if r.get("steps")]
    shown = [r for r in rows if r["method"] in ("scan", *DEFAULTS)]
    kinds = ("command", "method", "precision", "hardware")
    latest = {(*(r[kind] for kind in kinds), timed_model(r), unlearns(r)): r for r in shown}
    page = ""
    for r in latest.values():
        unit = r["epoch seconds"]
        body: list[list[object]] = [
            [step, spent["passes"], f"{spent['seconds'] / unit:.0f}", f"{spent['seconds']:.0f}"]
            for step, spent in r["steps"].items()
        ]
        body.append(
            ["all", r["passes"], text(r["time / training epoch"], ".0f"), text(r["seconds"], ".0f")]
        )
        what = f"`{r['command']} {timed_model(r)}` by `{r['method']}`"
        what += ", not unlearned" * (not unlearns(r))
        page += f"\n{what}, {r['hardware']}, {r['precision']}, an epoch of {unit:.2f} s:\n\n"
        page += table(["step", "passes", "time / training epoch", "seconds"], body)
    page += full_width(lines(folder / "full-width.jsonl"))
    return COST.rstrip() + "\n" + page if page else ""


def unlearns(record: Mapping[str, Any]) -> bool:
    """Whether the timed run had unlearned copies."""
    return "unlearn" in record.get("steps", {})


def full_width(rows: list[dict[str, Any]]) -> str:
    """What `reprune purify` took in a network of the papers' width, by its report."""
    body: list[list[object]] = [
        [
            f"{r['model']}, {r['attack']}, {r['epochs']} epochs",
            r["verdict"],
            *(f"{r[when]['ca']:.1f} / {r[when]['asr']:.1f}" for when in ("before", "after")),
            f"{sum(r['seconds'].values()):.0f}",
            f"{r['hardware']}, torch {r['versions']['torch']}",
        ]
        for r in rows
    ]
    head = ["`reprune purify`", "verdict", "CA / ASR before", "after", "seconds", "hardware"]
    return FULL_WIDTH + table(head, body) if body else ""
