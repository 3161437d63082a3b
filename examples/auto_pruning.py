"""What pruning by the default's evidence takes out: the section of the page on it."""

from __future__ import annotations

from pathlib import Path

from results_page import records as lines
from results_page import table

HEAD = """
## Why it does not prune

`examples/pruning_stage.py`, one draw in float32. Channels ranked by four kinds of evidence and by
the mean of their ranks: how far the recovered triggers move them, how much an unlearned copy moved
their weights, the masks that are recovered from it (RNP), their Lipschitz bounds (CLP). Pruned are
the fewest such that the triggers put aside move no more than `auto` leaves, within the accuracy
drop that it allows, where any are; else those that leave these triggers least. *Taught* is `auto`;
*all, then taught* begins with the pruned model of the row above, and stays there where the guard,
which compares with the original, refuses what was taught. CA / ASR, in brackets the ASR after
re-tuning as above, and how many channels were pruned.

"""


def pruning(folder: Path) -> str:
    """The section; empty without records."""
    found: dict[str, dict[str, str]] = {}
    for r in lines(folder / "pruning-stage.jsonl"):
        count = f", {r['pruned']} of {r['of']}" if r.get("pruned") is not None else ""
        figures = f"{r['ca']:.1f} / {r['asr']:.1f} ({r['reactivated']:.1f}){count}"
        found.setdefault(r["what"], {})[f"zoo:{r['attack']}"] = figures
    if not found:
        return ""
    attacks = list(dict.fromkeys(attack for some in found.values() for attack in some))
    rows: list[list[object]] = [
        [what, *(some.get(attack, "") for attack in attacks)] for what, some in found.items()
    ]
    return HEAD + table(["", *attacks], rows)
