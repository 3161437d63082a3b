"""How far the default's own judges can be relied on: two sections of its page."""

from __future__ import annotations

import re
from math import sqrt
from statistics import mean

from auto_records import DEFAULTS, IMAGES, attacked, by, drop, once, plain
from comparison_page import text
from results_page import table

from reprune.benchmark.record import Record
from reprune.defenses import Auto
from reprune.defenses.auto_repair import BETTER, COPIES

HEAD = """
### Does it say when it fails?

Where the triggers put aside still move more than {most:.0%} of the other images in the repaired
model, the report says that the repair does not suffice, and `purify` exits with 5. By that rule, on
what the runs noted (they are from before it); models that were called clean are not counted, and
come back as they are.

"""

GUARD = """
### How good is the guard?

It compares {copies} copies of {heldout:.0f} held-out images, and holds a repair back that loses
more than {limit:.0f} points there. Of all repairs, clean models that were doubted among them: how
far what it saw lies from the CA drop on the test images, as root mean square and on average, in
points; on how many it was more than {asked:g} points, on how many of these the CA drop was, too,
and on how many others.

"""

ASKED = 2.0
"""Points of accuracy: what most methods that prune may cost."""

MOVED = re.compile(r"(\d+)% of the other images moved by the triggers put aside")

STEP = re.compile(
    r"weights (\d+)% of the way from the original to the distilled ones: ([-+][\d.]+) points"
)


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


def guard(found: list[Record]) -> str:
    """The section; empty without repairs."""
    rows: list[list[object]] = []
    for method in DEFAULTS:
        runs = [(r, *seen) for r in once(by(plain(found), method)) if (seen := step(r))]
        whole = [(points, drop(r)) for r, share, points in runs if share == 100]
        if whole:
            off = [points - lost for points, lost in whole]
            warned = [lost for points, lost in whole if points > ASKED]
            missed = [lost for points, lost in whole if points <= ASKED < lost]
            rows.append(
                [
                    f"`{method}`",
                    len(runs),
                    len(runs) - len(whole),
                    text(sqrt(mean(x * x for x in off))),
                    text(mean(off), "+.1f"),
                    f"{len(warned)} ({sum(lost > ASKED for lost in warned)})",
                    len(missed),
                ]
            )
    asked = f"more than {ASKED:g} (CA drop, too)"
    head = ["", "repairs", "held back", "off by", "on average", asked, "missed"]
    auto = Auto()
    said = GUARD.format(
        copies=COPIES,
        heldout=auto.holdout * IMAGES,
        limit=100 * auto.max_accuracy_drop,
        asked=ASKED,
    )
    return said + table(head, rows) if rows else ""


def step(record: Record) -> tuple[int, float] | None:
    """Percent of the way to the repaired weights, and points of accuracy that the guard saw."""
    noted = [found for note in record.notes if (found := STEP.match(note))]
    return (int(noted[-1][1]), float(noted[-1][2])) if noted else None


def moved(record: Record) -> float | None:
    """The last share that was noted, in [0, 1]; `None` where nothing was repaired."""
    noted = [share for note in record.notes for share in MOVED.findall(note)]
    return int(noted[-1]) / 100 if noted else None


def said(runs: list[tuple[bool, bool]], *, gone: bool) -> str:
    those = [insufficient for fine, insufficient in runs if fine == gone]
    return f"{sum(those)} of {len(those)}"
