"""`render_filter`: a `FilterReport` as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from reprune.report.drawing import BLUE, GREY, RED, WIDTH, style, svg
from reprune.report.filter_report import FilterReport, Histogram
from reprune.report.html import data_uri, environment

BANNERS = {
    "clean": "No triggers found",
    "undecided": "Undecided",
    "backdoored": "Triggers found",
}


def render_filter(report: FilterReport, *, pictures: Any | None = None) -> str:
    """One HTML page without scripts and without anything loaded from elsewhere.

    Args:
        report: every number on the page.
        pictures: uint8 `(n, c, h, w)`, one for each of `report.suspects`; `None` shows none.
    """
    shown = [] if pictures is None else [data_uri(picture) for picture in np.asarray(pictures)]
    histogram = report.histogram
    page = (
        environment()
        .get_template("filter.html.j2")
        .render(
            report=report,
            banner=BANNERS[report.verdict],
            summary=summary(report),
            suspects=list(zip(report.suspects, shown, strict=False)),
            scores=None
            if histogram is None
            else Markup(score_histogram(histogram, report.threshold, report.scale)),
            notes=[*report.trace.notes, *report.notes],
        )
    )
    return page.encode("utf-8", "replace").decode()


def summary(report: FilterReport) -> str:
    """What was found, in plain language."""
    return (
        f"{report.flagged:,} of {report.images:,} images are flagged as carrying a trigger."
        + {
            "clean": " That is no more than false rejections of clean images explain.",
            "undecided": " That does not settle whether any image carries a trigger.",
            "backdoored": "",
        }[report.verdict]
    )


def score_histogram(histogram: Histogram, threshold: float | None, scale: str) -> str:
    """Shares of scores of clean and examined images, with the threshold (RNP, Figure 8).

    Args:
        histogram: counts between edges.
        threshold: drawn as a dashed line where given.
        scale: what a score is, in words.
    """
    with style("scores"):
        figure = Figure((WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        for counts, color, name in (
            (histogram.clean, GREY, "clean images"),
            (histogram.examined, BLUE, "examined images"),
        ):
            if counts:
                shares = np.asarray(counts) / max(sum(counts), 1)
                axes.stairs(shares, histogram.edges, fill=True, color=color, alpha=0.65, label=name)
        if threshold is not None:
            axes.axvline(threshold, color=RED, lw=1.2, ls=(0, (4, 3)), label="threshold")
        axes.set_xlabel(f"score: {scale}")
        axes.set_ylabel("share of images")
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=3, fontsize=8.5)
        line = "" if threshold is None else f" The threshold is {threshold:.3g}."
        return svg(
            figure,
            f"Histogram of scores of {sum(histogram.examined)} examined and "
            f"{sum(histogram.clean)} clean images.{line}",
        )
