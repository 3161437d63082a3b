"""What pictures that a repaired copy still follows teach: a section of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_mixtures import cell
from auto_others import looked, taught_pictures
from auto_today import backdoored, draw_of, latest, pictured, run_of, tested
from results_page import records as lines
from results_page import table

HEAD = """
### Pictures in the copy

A copy that the judges are content with is searched for added pictures, too, sharp and smooth, that
lead to a class which it was repelled from; some teach once more. Some runs of [today's
default](#todays-default) are from before that, but not from before anything else. The same models
and draws with it, by `examples/default.py`: CA / ASR after, in brackets the ASR after re-tuning as
[below](#can-it-be-woken-again). *Found* says of which pictures, from how many squared pixels. By
the first rule, at commit {first}, those taught that are smaller than the median of what innocent
classes of the model needed; by today's, chosen after these runs, those that are smaller than any of
these needed, and where there are none the repair is the one before. `cifar10-soft` has [soft
noise](#published-triggers-on-other-data), and was trained when the rule stood; without is it at
commit {last}.

"""

SOUGHT = """
In {found} of {runs} runs of today's default that sought pictures in the copy some were that small.
"""

FIRST, LAST = "06f7c85", "e6ca882"
"""The commit with the first rule, and the one before it."""

RULES = {"looks-median": "the median", "looks": "any"}
"""By file of records, what pictures had to be smaller than."""


def looks(folder: Path) -> str:
    """The section; empty without records."""
    without = [*lines(folder / "default.jsonl"), *lines(folder / "looks-without.jsonl")]
    before = {run_of(r): r for r in without if not pictured(r)}
    rows = [
        [
            r["model"],
            draw_of(r),
            rule,
            looked(r),
            f"{r['ca before']:.1f} / {r['asr before']:.1f}",
            cell(old, " after"),
            cell(r, " after"),
        ]
        for name, rule in RULES.items()
        for r in backdoored(latest(folder, name))
        if (old := before.get(run_of(r))) and tested(old) == tested(r)
    ]
    if not rows:
        return ""
    head = ["model", "draw", "smaller than", "found", "as it came", "without", "with"]
    return HEAD.format(first=FIRST, last=LAST) + table(head, rows) + sought(latest(folder))


def sought(runs: Sequence[Mapping[str, Any]]) -> str:
    """In how many runs pictures taught; empty where none were sought."""
    tried = [r for r in runs if pictured(r)]
    found = [r for r in tried if taught_pictures(r)]
    return SOUGHT.format(found=len(found), runs=len(tried)) if tried else ""
