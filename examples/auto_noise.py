"""What filters tell, and what noise of each image would: the section of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from auto_others import done, known, least, recorded
from noise_search import FAMILIES
from results_page import records as lines
from results_page import table

from reprune.detection import Scan
from reprune.detection.evidence import NATURAL_FILTER
from reprune.detection.signs import filter_sign, lower_quartile
from reprune.results import Sign

SEEN = frozenset(
    {
        "smallvgg-lira",
        "smallvgg-lira, again",
        "smallvgg-clean",
        "cifar10-vgg16-brief",
        "cifar10-vgg16-brief, again",
        "cifar10-vgg16-dfst",
        "gtsrb-resnet18-second",
        "gtsrb-vgg16-second",
        "ibau_cifar10_badnets",
        "ibau_cifar10_trojan_wm",
        "ibau_gtsrb_badnets",
    }
)
"""Models, beside the zoo's, that the bound on filters was set with."""

HEAD = """
## Filters, and noise of each image

`examples/noise_search.py`, in float32: 5 x 5 filters, and noise that a small network draws from
each image, sought in the model alone. Before the brackets the class that the smallest one leads to,
in them its size, how many times as much the next class takes, and its share of the lower quartile
over the classes; several draws of clean images in turn. Models of the recipes were trained for it
in float32, and where it says *again* once more, which makes another model.

"""

FILTERS = """
The scan seeks filters where nothing else is unusual, and one casts doubt that is small: at most
{most:.1f} squared pixels on images of 32 x 32, where the next class takes {gap:.1f} times as much
or more. The smallest filter to a class that no backdoor leads to has {least:.1f}. In {alarms} of
{clean} searches of clean models a filter casts doubt, and in {wrong} of {others} of backdoored ones
one to another class than theirs. {apart} of these {total} searches are of models that the bound was
not set with; so small a filter is in {alike} of those.

Noise is in no default: it names a class of a clean model and a wrong one of `zoo:trojan` nearly as
clearly as LIRA's.
"""

REPAIR = """
A small VGG with a backdoor of LIRA whose noise may be three times the paper's, and which half took
(CA {ca:.1f}, ASR {asr:.1f}). Without filters the scan said "{verdict}" ({strength:.2f}). If the
repair is told the target class, what it does by kinds of triggers, of the model alone, that teach:

"""

DEFAULT = """
### What the default does about it

Part `default` of the script, where nobody tells the target class; the VGG with LIRA is of another
training, which took better. A copy that the judges are content with is searched for filters to the
suspect: where one is small, at most {natural:.0f} squared pixels and less than half of what other
classes need, a copy is distilled once more with filters among the lessons. *Filters taught* says in
how many squared pixels that was so. *Filters after* are sought in what came back: the smallest of
four to the suspect, and the median of those to five other classes; *none* reaches nine images of
ten. Rows without them were made before copies were searched. *Mixtures* says
[how these were taught](#what-mixtures-teach).

"""

SILENT = """
In {silent} of {all} repairs no filter was so small, and nothing was done. The smallest one to the
suspect takes {least:.0f} squared pixels there.
"""


def noise(folder: Path) -> str:
    """The section; empty without records."""
    found = lines(folder / "noise-search.jsonl")
    searched = [r for r in found if r["part"] == "sizes" and r["family"] in FAMILIES]
    if not searched:
        return ""
    rows = []
    for model in dict.fromkeys(r["model"] for r in searched):
        mine = [r for r in searched if r["model"] == model]
        known = next(r["target"] for r in mine)
        named = [", ".join(_named(r) for r in mine if r["family"] == f) or "–" for f in FAMILIES]
        rows.append([model, "–" if known is None else known, *named])
    page = HEAD + table(["model", "target", *FAMILIES], rows)
    page += _filters([r for r in searched if r["family"] == "filter"])
    repaired = [r for r in found if r["part"] == "repair"]
    if repaired:
        page += _repair(repaired)
    ran = [r for r in found if r["part"] == "default"]
    if not ran:
        return page
    return page + _default(ran)


def _default(ran: Sequence[Mapping[str, Any]]) -> str:
    """What repairs did, and what filters say of what came back."""
    head = ["model", "target", "draw", "class named", "CA", "ASR", "RA after"]
    head += ["filters taught", "filters after (others)", "mixtures"]
    rows = [
        [
            *(r[key] for key in ("model", "target", "draw")),
            *done(r),
            _taught(r) or "–",
            _after(r),
            r.get("mixtures", "as answered"),
        ]
        for r in ran
    ]
    page = DEFAULT.format(natural=NATURAL_FILTER) + table(head, rows)
    looked = [r for r in ran if "filters" in r]
    silent = [min(known(r["filters"])) for r in looked if _taught(r) is None]
    if not silent:
        return page
    return page + SILENT.format(silent=len(silent), all=len(looked), least=min(silent))


def _taught(record: Mapping[str, Any]) -> str | None:
    """The size of the smallest filter that still led a copy to the suspect, if it was small."""
    pattern = re.compile(r"filter (?:of|from) ([\d.]+) squared pixels")
    return next((said[1] for note in record["notes"] if (said := pattern.search(note))), None)


def _after(record: Mapping[str, Any]) -> str:
    if "filters" not in record:
        return "–"
    found = min(known(record["filters"])), median(known(record["filters of others"]))
    suspect, others = ("none" if size == inf else f"{size:.0f}" for size in found)
    return f"{suspect} ({others})"


def _filters(found: Sequence[Mapping[str, Any]]) -> str:
    """How often a filter casts doubt where it should not."""
    scan = Scan()
    clean = sum(r["target"] is None for r in found)
    wrong = [r for r in found if (sign := _doubt(r)) and sign.label != r["target"]]
    alarms = sum(r["target"] is None for r in wrong)
    return FILTERS.format(
        most=NATURAL_FILTER * scan.ratio**scan.clear,
        gap=scan.gap**scan.clear,
        least=min(map(least, found)),
        alarms=alarms,
        clean=clean,
        wrong=len(wrong) - alarms,
        others=len(found) - clean,
        apart=sum(map(_apart, found)),
        total=len(found),
        alike=sum(map(_apart, wrong)),
    )


def _apart(record: Mapping[str, Any]) -> bool:
    """Whether the bound was set without the model."""
    return not record["model"].startswith("zoo:") and record["model"] not in SEEN


def _doubt(record: Mapping[str, Any]) -> Sign | None:
    """The sign of a search for filters in a scan, if it casts doubt."""
    scan = Scan()
    found = filter_sign(recorded(record), scan.gap, NATURAL_FILTER, scan.ratio)
    return next((sign for sign in found if sign.strength >= scan.clear), None)


def _repair(repaired: Sequence[Mapping[str, Any]]) -> str:
    first = repaired[0]
    page = REPAIR.format(
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
    sizes = known(record["sizes"])
    (first, label), (second, _) = sorted((size, k) for k, size in enumerate(sizes))[:2]
    finite = [size for size in sizes if size < inf]
    if len(finite) < 2:
        return "–"
    share = first / lower_quartile(finite)
    return f"{label} ({first:.1f}; {second / first:.1f} times; {share:.2f})"
