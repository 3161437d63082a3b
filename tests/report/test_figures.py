"""Figures: well-formed SVG, nothing global changed."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from synthetic import NAMES, make_report

from reprune.report import Budget, figures, learned
from reprune.report.drawing import shorten
from reprune.results import Episode, Epoch, LearnedPrune, PruningPoint, SiteMask

REPORT = make_report()
TRACE = REPORT.trace
GROUP = LearnedPrune(
    layers=("layer4.0.bn1", "layer4.1.bn1", "layer3"),
    own=2,
    nodes=((0, 0), (0, 3), (1, 1), (1, 2), (2, 0)),
    edges=((0, 2), (4, 1), (1, 3)),
    pruned=(2,),
    episodes=(Episode(-0.1, 0.9, 1.0, 1), Episode(0.4, 0.88, 0.5, 2)),
)
DRAWINGS = {
    "rewards": lambda: learned.reward_curves([GROUP, GROUP]),
    "one episode": lambda: learned.reward_curves(
        [LearnedPrune(("a",), 1, ((0, 0),), (), (), GROUP.episodes[:1])]
    ),
    "graph": lambda: learned.pruned_graph(GROUP),
    "graph of one node": lambda: learned.pruned_graph(
        LearnedPrune(("a",), 1, ((0, 0),), (), (), ())
    ),
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


def test_pruned_nodes_are_red() -> None:
    svg = learned.pruned_graph(GROUP)
    assert "1 of the 4 that may be pruned are" in svg
    assert svg.count("#b3261e") >= 2  # the node, and the connection that it had
    untouched = learned.pruned_graph(LearnedPrune(**{**vars(GROUP), "pruned": ()}))
    assert "#b3261e" not in untouched


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
    assert shorten("stop\n sign") == "stop sign"
    assert shorten("a" * 30, 10) == "a" * 9 + "…"
