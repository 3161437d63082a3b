"""Attacks that no setting was chosen with: the section of the page on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from carried_triggers import CASES
from results_page import records as lines
from results_page import table
from several_backdoors import CASES as SEVERAL_CASES
from several_backdoors import EPOCHS, IMAGES, RATE

from reprune.detection import Recovered, Scan
from reprune.detection.evidence import NATURAL_ADDED, SIDE
from reprune.detection.signs import several_signs
from reprune.results import Sign

LOOKED = re.compile(r"\d+ (filter|additive|smooth) from ([\d.]+) squared pixels")

HEAD = """
## Attacks that nobody had in view

`examples/other_attacks.py`, one draw in float32: triggers that are not of the twelve attacks, made
after all settings stood; but for frequencies and soft noise, which are added pictures, and the
photo filter, which linear filters come near to, of no family of the search. Implanted into
`zoo:clean` and a small VGG of the recipes in three epochs on 25,000 or 15,000 images, rate 10 %,
target 4; where that took little, little was there to remove.

"""

CARRIED = """
### Published triggers on other data

`examples/carried_triggers.py`, one draw in float32: triggers of the published models, and fixed
noise, of single pixels or soft, in networks that were trained anew on another data set: small VGGs
of their architecture, and, where the table says so, others; twice as large on images of 64 x 64.
*Taught once more* are pictures and filters that were [found in the copy](#pictures-in-the-copy); a
dash may be a run from before pictures were sought there.

"""


SEVERAL = """
### Several backdoors in one model

`examples/several_backdoors.py`, one draw in float32: triggers of the published models, and fixed
noise, each on {rate:.0%} of {images:,} images, in a small VGG of their architecture, trained on
these for {epochs} epochs. *Named* are the classes that searches accuse, or of an undecided verdict
the one that makes it so. Rows marked *before* are by the rules before several classes were accused
at once ([methods.md](methods.md#the-scan)), and two were repaired at most.

"""


NATURAL = """
From {bound:.2f} squared pixels down, in proportion to the values of an image, classes are accused
beside each other. Without a backdoor no class is near: the smallest added picture to any has
{clean:.2f} in {models} clean models, and to classes that are no target {other:.2f} in {backdoored}
models with one (`examples/noise_search.py sizes --families additive`). In {alarms} of these the
sign speaks.
"""


def several(folder: Path) -> str:
    """The section; empty without records."""
    rows: list[list[object]] = []
    for r in lines(folder / "several-backdoors.jsonl"):
        case = SEVERAL_CASES[r["case"]]
        left = [
            f"{title} ({case.targets[title]}): {one['asr before']:.1f} → {one['asr after']:.1f}"
            for title, one in r["backdoors"].items()
        ]
        first = next(iter(r["backdoors"].values()))
        accused = [label for _, label, strength in r["signs"] if strength >= 1]
        named = ", ".join(map(str, dict.fromkeys(accused or [r["suspect"]])))
        rows.append(
            [
                case.title + ", before" * (r.get("rules") == "before"),
                case.data,
                f"{named} ({r['verdict']}, {r['strength']:.2f})",
                f"{first['ca before']:.1f} → {first['ca after']:.1f}",
                "; ".join(left),
            ]
        )
    head = ["model", "data", "named", "CA", "ASR by trigger (target)"]
    said = SEVERAL.format(rate=RATE, images=IMAGES, epochs=EPOCHS)
    return said + table(head, rows) + natural(folder) if rows else ""


def natural(folder: Path) -> str:
    """How small added pictures are that lead where no backdoor does; empty without records."""
    found = [r for r in lines(folder / "noise-search.jsonl") if r.get("family") == "additive"]
    clean, backdoored = (
        [r for r in found if (r["target"] is None) == wanted] for wanted in (True, False)
    )
    if not (clean and backdoored):
        return ""
    bound = NATURAL_ADDED * Scan().ratio
    return NATURAL.format(
        bound=bound,
        clean=min(map(least, clean)),
        models=len(clean),
        other=min(map(least, backdoored)),
        backdoored=len(backdoored),
        alarms=sum(bool(spoken(r)) for r in found),
    )


def least(record: Mapping[str, Any]) -> float:
    """The smallest size to a class that is no target, on images of `SIDE`."""
    return min(size for k, size in enumerate(recorded(record).sizes) if k != record["target"])


def spoken(record: Mapping[str, Any]) -> list[Sign]:
    """What `several_signs` says of these sizes."""
    return several_signs(recorded(record), NATURAL_ADDED, Scan().ratio)


def recorded(record: Mapping[str, Any]) -> Recovered:
    """What a search for a trigger of each class found, as on images of `SIDE`."""
    grown = (record.get("side", SIDE) / SIDE) ** 2
    sizes = tuple(size / grown for size in known(record["sizes"]))
    nothing = (lambda images: images,) * len(sizes)
    return Recovered(tuple(range(len(sizes))), nothing, sizes)


def known(sizes: Sequence[float | None]) -> tuple[float, ...]:
    """Sizes, infinite where no trigger was found."""
    return tuple(inf if size is None else size for size in sizes)


def others(folder: Path) -> str:
    """The section; empty without records."""
    rows = [[r["title"], r["model"], *done(r)] for r in lines(folder / "other-attacks.jsonl")]
    carried = [
        [CASES[r["case"]].title, r["data"], *done(r), looked(r)]
        for r in lines(folder / "carried-triggers.jsonl")
    ]
    head = ["class named", "CA", "ASR", "RA after", "floor"]
    page = HEAD + table(["trigger", "into", *head], rows) if rows else ""
    carried_head = ["trigger", "data", *head[:-1], "taught once more"]
    page += CARRIED + table(carried_head, carried) if carried else ""
    return page + several(folder)


def done(record: Mapping[str, Any]) -> list[object]:
    """What the scan said and what the repair did; last, where known, what a clean model does."""
    ca, asr = (
        f"{record[f'{of} before']:.1f} → {record[f'{of} after']:.1f}" for of in ("ca", "asr")
    )
    floor = [f"{record['floor']:.1f}"] if "floor" in record else []
    return [named(record), ca, asr, f"{record['ra after']:.1f}", *floor]


def looked(record: Mapping[str, Any]) -> str:
    """What led the copy to a suspect and taught once more, as the notes tell."""
    said = [kind for note in record["notes"] for kind in LOOKED.findall(note)]
    return ", ".join(f"{family} {size}" for family, size in said) or "–"


def taught_pictures(record: Mapping[str, Any]) -> bool:
    """Whether pictures were found in the copy and taught once more."""
    return any(family in looked(record) for family in ("additive", "smooth"))


def named(record: Mapping[str, Any]) -> str:
    """The class that the scan named, and how surely."""
    strength = "" if record["strength"] is None else f", {record['strength']:.2f}"
    suspect = "–" if record["suspect"] is None else record["suspect"]
    return f"{suspect} ({record['verdict']}{strength})"
