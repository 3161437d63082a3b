"""Whether the default says so when a repair did not suffice: a section of its page."""

from __future__ import annotations

import re

from auto_records import DEFAULTS, attacked, by, once, plain
from results_page import table

from reprune.benchmark.record import Record
from reprune.defenses import Auto
from reprune.defenses.auto_run import BETTER

HEAD = """
### Does it say when it fails?

Where the triggers put aside still move more than {most:.0%} of the other images in the repaired
model, the report says that the repair does not suffice, and `purify` exits with 5. By that rule, on
what the runs noted (they are from before it); models that were called clean are not counted, and
come back as they are.

"""

MOVED = re.compile(r"(\d+)% of the other images moved by the triggers put aside")


def judges(found: list[Record]) -> str:
    """The section; empty without repairs."""
    most = Auto().left_over / BETTER
    rows: list[list[object]] = []
    for method in DEFAULTS:
        runs = [
            (r.after["asr"] < 5, left > most)
            for r in once(by(plain(found), method))
            if attacked(r) and (left := moved(r)) is not None
        ]
        if runs:
            rows.append([f"`{method}`", said(runs, gone=True), said(runs, gone=False), len(runs)])
    head = ["", "says so, ASR below 5", "says so, ASR of 5 and more", "runs"]
    return HEAD.format(most=most) + table(head, rows) if rows else ""


def moved(record: Record) -> float | None:
    """The last share that was noted, in [0, 1]; `None` where nothing was repaired."""
    noted = [share for note in record.notes for share in MOVED.findall(note)]
    return int(noted[-1]) / 100 if noted else None


def said(runs: list[tuple[bool, bool]], *, gone: bool) -> str:
    those = [insufficient for fine, insufficient in runs if fine == gone]
    return f"{sum(those)} of {len(those)}"
