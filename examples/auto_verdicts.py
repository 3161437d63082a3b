"""What the scan says of clean and of backdoored models: a section of the page, and the curve."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import torch
from auto_records import in_view, is_clean, models, plain, scans, searched_fully
from comparison_page import text
from matplotlib.figure import Figure
from results_page import table

from reprune.benchmark.record import Record
from reprune.benchmark.sifting import auroc
from reprune.detection import Scan
from reprune.metrics import wilson_interval
from reprune.report.drawing import style, svg

ROC = """
## Is there a backdoor?

The scan's score is its strongest sign: 1 accuses, below {clear:g} is mostly called clean. {models}
clean models ([recipes/small_models.py](../recipes/small_models.py) and `zoo:clean`) and
{backdoored} backdoored ones, {scans} scans in all. *Set aside* are those that were not in view when
the bounds were set. A scan compares its score with all the clean ones. *Fewer searches*: scans
before there was that for waves, or also before those for smooth pictures, warps and all-to-all, so
that their score may be too low.

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
    apart = [r for r in good if not in_view(r.experiment.model.label) and searched_fully(r)]
    foreign = [r for r in bad if not in_view(r.experiment.model.label)]
    named = sum(r.figures["top"] == r.figures["target"] for r in bad)
    page += table(
        ["", "called backdoored", "undecided", "called clean"],
        [
            counted(some, title)
            for title, some in (
                ("clean", [r for r in good if searched_fully(r)]),
                ("clean, fewer searches", [r for r in good if not searched_fully(r)]),
                ("clean, set aside", apart),
                ("backdoored", [r for r in bad if searched_fully(r)]),
                ("backdoored, fewer searches", [r for r in bad if not searched_fully(r)]),
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
    full = {r.experiment.model.label for r in good if searched_fully(r)}
    return page + table(
        ["clean model", "CA", "set aside", "searches", "strength"],
        [
            [
                name,
                text(accuracy.get(name)),
                "" if in_view(name) else "yes",
                "all" if name in full else "fewer",
                ", ".join(f"{s:.2f}" for s in some),
            ]
            for name, some in sorted(harmless.items(), key=lambda item: -max(item[1]))
        ],
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
