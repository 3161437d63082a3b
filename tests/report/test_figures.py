"""Figures: well-formed SVG, nothing global changed."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from synthetic import NAMES, make_report

from reprune.report import Budget, figures
from reprune.results import Epoch, PruningPoint, SiteMask

REPORT = make_report()
TRACE = REPORT.trace
DRAWINGS = {
    "predictions": lambda: figures.prediction_histogram([9, 1] * 5, NAMES, 0),
    "no predictions": lambda: figures.prediction_histogram([0] * 10, NAMES),
    "thousand classes": lambda: figures.prediction_histogram([1] * 1000, ["$_{" * 9] * 1000),
    "masks": lambda: figures.mask_histograms(TRACE.masks),
    "one mask": lambda: figures.mask_histograms([SiteMask("a", "b", (0.0,), (-2.0,), (0,))]),
    "curve": lambda: figures.pruning_curve(TRACE.curve, TRACE.chosen, Budget("drop", 0.02)),
    "disagreement": lambda: figures.pruning_curve(
        [PruningPoint(0.0, 0, 0.9, 0.0, 0.0)], 0, Budget("disagreement", 0.02)
    ),
    "phases": lambda: figures.phase_curves({"a": [Epoch(0, float("nan"), 0.1)], "b": []}),
    "features": lambda: figures.feature_maps(
        {"original": {"x": np.eye(3)[None]}, "pruned": {"x": np.zeros((1, 3, 3))}},
        np.zeros((1, 4, 6), np.uint8),
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_are_described_svg_and_change_no_setting(name: str) -> None:
    before = dict(matplotlib.rcParams)
    svg = DRAWINGS[name]()
    assert dict(matplotlib.rcParams) == before
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img"
    assert len(root.get("aria-label", "")) > 20
    assert svg == DRAWINGS[name]()


def test_pyplot_is_not_used() -> None:
    DRAWINGS["curve"]()
    assert not Gcf.figs  # the figures that pyplot would keep open


def test_ids_do_not_collide_between_figures() -> None:
    first = figures.mask_histograms(TRACE.masks)
    second = figures.pruning_curve(TRACE.curve)

    def ids(svg: str) -> set[str]:
        return {e.get("id", "") for e in ElementTree.fromstring(svg).iter()} - {""}

    assert not ids(first) & ids(second)


def test_names_are_shortened() -> None:
    assert figures.shorten("stop\n sign") == "stop sign"
    assert figures.shorten("a" * 30, 10) == "a" * 9 + "…"
