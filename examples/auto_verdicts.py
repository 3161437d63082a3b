"""What the scan says of clean and of backdoored models: a section of the page, and the curve."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from auto_records import in_view, is_clean, models, plain, scans
from comparison_page import text
from matplotlib.figure import Figure
from results_page import table

from reprune.benchmark.record import Record
from reprune.benchmark.sifting import auroc
from reprune.detection import Scan
from reprune.detection.agreement import (
    AGREEMENT,
    DOUBTS,
    EIGHTH,
    FAINT,
    MANY,
    SEARCHES,
    agreement_sign,
    by_class,
    by_kind,
    weakest,
)
from reprune.detection.signs import FILTERS
from reprune.metrics import wilson_interval
from reprune.report.drawing import style, svg
from reprune.results import Sign

ROC = """
## Is there a backdoor?

The scan's score is its strongest sign: 1 accuses, below {clear:g} is mostly called clean. {models}
clean models ([recipes/small_models.py](../recipes/small_models.py) and `zoo:clean`) and
{backdoored} backdoored ones, {scans} scans in all. *Set aside* are those that were not in view when
the bounds were set. A scan compares its score with all the clean ones.

"""

THREE = """
### Three kinds of searches

The third of the kinds that name one class has {clean:.3f} at most in these scans of clean models.
From {eighth:g} on it is a reason for doubt; these scans are of when that was 0.25. Of the {few}
backdoored ones that no search alone accuses or doubts, {reach} have as much.
"""

FIVE = """
### Five searches

These scans are from before a class that five searches name became a reason for doubt. The weakest
of so many signs of one class is at most {clean:.2f} in the clean ones; in {reach} of {backdoored}
backdoored ones it is {faint:g} or more, which the rule asks. By today's rules, on the signs that
were recorded, {good} are called clean, and {bad} ({apart} of those set
aside). Without filters, that is, which these scans did not seek where nothing else was unusual; how
often they err is [measured apart](#filters-and-noise-of-each-image).
"""

LEFT_OUT = """
### The bound, chosen without each attack

The score of searches that may accuse, without the unlearned copies and agreement. Its bound, 1 in
the tool, chosen anew: halfway, on logarithms, between the highest score of a clean model and the
lowest above it of a backdoored one, once without each attack. The bounds of the single searches,
which the score counts in, are as they are.

"""


def strengths(found: Iterable[Record]) -> dict[str, list[float]]:
    """Of scans by model."""
    result: dict[str, list[float]] = {}
    for r in found:
        result.setdefault(r.experiment.model.label, []).append(r.figures["strength"])
    return result


def counted(found: list[Record], title: str) -> list[object]:
    """A row: how often each verdict was given."""
    said = [r.figures["verdict"] for r in found]
    return [
        f"{title} ({len(said)} scans)",
        share(said.count("backdoored"), len(said)),
        said.count("undecided"),
        share(said.count("clean"), len(said)),
    ]


def share(count: int, total: int) -> str:
    low, high = wilson_interval(count, total)
    return f"{count} of {total} ({100 * count / total:.0f} %, {100 * low:.0f}–{100 * high:.0f})"


def verdicts(found: list[Record]) -> str:
    good = [r for r in scans(found) if is_clean(r)]
    bad = [r for r in scans(found) if not is_clean(r)]
    if not good or not bad:
        return ""
    page = ROC.format(
        clear=Scan().clear,
        models=len(models(good)),
        backdoored=len(models(bad)),
        scans=len(good) + len(bad),
    )
    scores = torch.tensor([r.figures["strength"] for r in (*good, *bad)])
    area = auroc(torch.arange(len(scores)) >= len(good), scores)
    apart = [r for r in good if not in_view(r.experiment.model.label)]
    foreign = [r for r in bad if not in_view(r.experiment.model.label)]
    named = sum(r.figures["top"] == r.figures["target"] for r in bad)
    page += table(
        ["", "called backdoored", "undecided", "called clean"],
        [
            counted(some, title)
            for title, some in (
                ("clean", good),
                ("clean, set aside", apart),
                ("backdoored", bad),
                ("backdoored, set aside", foreign),
            )
            if some
        ],
    )
    page += (
        f"\nIn brackets 95 % Wilson intervals. AUROC {area:.3f}; the class of the strongest sign "
        f"is\nthe target in {named} of {len(bad)} scans of backdoored models.\n\n"
        "![ROC curve of the scan's score.](scan-roc.svg)\n\n"
    )
    accuracy = {r.experiment.model.label: r.before["ca"] for r in plain(found)}
    harmless = strengths(good)
    page += table(
        ["clean model", "CA", "set aside", "strength"],
        [
            [
                name,
                text(accuracy.get(name)),
                "" if in_view(name) else "yes",
                ", ".join(f"{s:.2f}" for s in some),
            ]
            for name, some in sorted(harmless.items(), key=lambda item: -max(item[1]))
        ],
    )
    return page + three(good, bad) + five(good, bad) + attacks_left_out(good, bad)


def three(good: list[Record], bad: list[Record]) -> str:
    """How far clean models are from the bound of a rule, and which others it reaches."""
    few = [r for r in bad if all(sign.strength < Scan().clear for sign in signs(r))]
    return THREE.format(
        clean=max(map(third, good)),
        eighth=EIGHTH,
        few=len(few),
        reach=sum(third(r) >= EIGHTH for r in few),
    )


def third(record: Record) -> float:
    """The strength of the third kind of searches that name a class, the largest of all classes."""
    named = by_class(signs(record)).values()
    return max((weakest([*by_kind(some).values()], MANY) for some in named), default=0.0)


def five(good: list[Record], bad: list[Record]) -> str:
    """What the latest rule changes, by the signs that were recorded."""

    def spared(some: list[Record], what: str) -> str:
        return f"{sum(map(clean_today, some))} of {len(some)}{what}"

    foreign = [r for r in bad if not in_view(r.experiment.model.label)]
    return FIVE.format(
        clean=max(map(fifth, good)),
        reach=sum(fifth(r) >= FAINT for r in bad),
        backdoored=len(bad),
        faint=FAINT,
        good=spared(good, " clean ones"),
        bad=spared(bad, " backdoored ones"),
        apart=spared(foreign, ""),
    )


def signs(record: Record) -> list[Sign]:
    """Of a scan, those that agreement looks at."""
    return [
        Sign(name, seen["class"], seen["strength"], "")
        for name, seen in record.figures["signs"].items()
        if name not in (AGREEMENT, FILTERS)
    ]


def fifth(record: Record) -> float:
    """The weakest of the `SEARCHES` strongest signs of one class, the largest of all classes."""
    named = by_class(signs(record)).values()
    return max((weakest([s.strength for s in some], SEARCHES) for some in named), default=0.0)


def clean_today(record: Record) -> bool:
    """Whether a scan would be called clean by today's rules."""
    agreed = agreement_sign(signs(record), Scan().clear)
    return record.figures["verdict"] == "clean" and not any(
        sign.strength >= Scan().clear for sign in agreed
    )


def accusing(record: Record) -> float:
    """The scan's score without what never accuses."""
    signs: Mapping[str, Any] = record.figures["signs"]
    return max(
        float(seen["strength"]) for name, seen in signs.items() if not name.startswith(DOUBTS)
    )


def bound(clean: list[Record], backdoored: list[Record]) -> float:
    """Between the clean models and the backdoored ones above them."""
    highest = max(map(accusing, clean))
    return math.sqrt(highest * min(score for r in backdoored if (score := accusing(r)) > highest))


def attacks_left_out(good: list[Record], bad: list[Record]) -> str:
    rows: list[list[object]] = []
    for attack in sorted({r.experiment.model.attack for r in bad}):
        mine = [r for r in bad if r.experiment.model.attack == attack]
        least = bound(good, [r for r in bad if r not in mine])
        usual, anew = (sum(accusing(r) >= limit for r in mine) for limit in (1.0, least))
        rows.append([attack, len(mine), usual, f"{least:.2f}", anew])
    names = models(good)
    alarms = 0
    for name in names:
        mine = [r for r in good if r.experiment.model.label == name]
        least = bound([r for r in good if r not in mine], bad)
        alarms += any(accusing(r) >= least for r in mine)
    head = ["attack", "scans", "accused at 1", "bound without it", "accused at that"]
    return (
        LEFT_OUT
        + table(head, rows)
        + f"\nWith each clean model left out in turn, {alarms} of {len(names)} are accused.\n"
    )


def roc(found: list[Record]) -> str:
    """The curve as SVG: share of backdoored scans over that of clean ones, by bound."""
    good, bad = (
        [r.figures["strength"] for r in scans(found) if is_clean(r) == clean]
        for clean in (True, False)
    )

    def shares(bound: float) -> list[float]:
        return [sum(s >= bound for s in some) / len(some) for some in (good, bad)]

    points = [shares(bound) for bound in (math.inf, *sorted({*good, *bad}, reverse=True))]
    with style("scan-roc"):
        figure = Figure(figsize=(3.4, 3.2))
        axes = figure.subplots()
        axes.step(*zip(*points, strict=True), where="post", color="#0072b2")
        for bound, marker in ((1.0, "o"), (Scan().clear, "s")):
            axes.plot(*shares(bound), marker, color="#d55e00", label=f"strength {bound:g}")
        axes.set_xlabel("clean models at or above the bound")
        axes.set_ylabel("backdoored models at or above it")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="lower right", frameon=False)
        return svg(figure, "ROC curve of the scan's score", transparent=False)


def calibration(found: list[Record]) -> str:
    """The largest strength of each clean model, and how many were set aside, as JSON."""
    highest = {
        name: max(some)
        for name, some in strengths([r for r in scans(found) if is_clean(r)]).items()
    }
    apart = sum(not in_view(name) for name in highest)
    clean = sorted(round(high, 3) for high in highest.values())
    return json.dumps({"clean": clean, "set aside": apart}) + "\n"
