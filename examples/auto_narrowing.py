"""Where short searches of many classes put the one of the backdoor: a section of the page."""

from __future__ import annotations

from pathlib import Path

from results_page import records as lines
from results_page import table

from reprune.detection.narrowing import FIRST, MANY, count

HEAD = """
### Very many classes

`examples/narrowing.py`, one draw in float32. Of more than {most} classes a scan searches {few} at
most: the first {first} of each of these short searches, and others by chance
([how](methods.md#the-scan)). These models have fewer, and all their classes are searched. How many
classes each search puts before that of the backdoor:

"""

SHORT = """
In {kept} of {all} the class is among the first {first} of one search at least.
"""


def narrowing(folder: Path) -> str:
    """The section; empty without records."""
    found = lines(folder / "narrowing.jsonl")
    if not found:
        return ""
    families = list(found[0]["before"])
    rows = [
        [r["model"], r["classes"], r["target"], *(r["before"][family] for family in families)]
        for r in found
    ]
    kept = sum(min(r["before"].values()) < FIRST for r in found)
    head = HEAD.format(most=MANY, few=count(MANY + 1), first=FIRST)
    page = head + table(["model", "classes", "target", *families], rows)
    return page + SHORT.format(kept=kept, all=len(found), first=FIRST)
