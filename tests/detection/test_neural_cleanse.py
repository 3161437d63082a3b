"""`NeuralCleanse`: the verdict on trigger sizes, and the anomaly index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from reprune.detection import Inverted, NeuralCleanse, anomaly_indices
from reprune.results import BackdoorLabel, Finding, from_json, to_json

PIXELS = 1024
NONE = math.inf
NAN = math.nan


def judge(
    sizes: Sequence[float],
    label: BackdoorLabel | None = None,
    detector: NeuralCleanse | None = None,
) -> Finding:
    count = len(sizes)
    inverted = Inverted(
        tuple(range(count)),
        torch.zeros(count, 1, 32, 32),
        torch.zeros(count, 3, 32, 32),
        tuple(sizes),
        tuple(0.97 if math.isfinite(size) else 0.0 for size in sizes),
    )
    return (detector or NeuralCleanse()).judge(inverted, label)


def unlearned(label: int | None) -> BackdoorLabel:
    return BackdoorLabel(label, (1, 9), 0.9, 0.8, f"models answer class {label}")


@pytest.mark.parametrize(
    ("sizes", "verdict", "target"),
    [
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 50], "clean", None),
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 26], "clean", None),  # 52 %: outlying, but large
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 20], "undecided", None),  # between 35 % and 50 %
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 16], "backdoored", 9),
        ([4, 52, 48, 51, 49, 50, 53, 5, 50, 50], "backdoored", 0),  # two: the smaller is named
        ([1, 60, 20, 200, 5, 400, 100, 10, 700, 30], "undecided", None),  # small, but all differ
        ([NONE, 6, NONE, NONE], "backdoored", 1),  # a shortcut where no other class has any
        ([NONE, NONE, NONE, 600], "undecided", None),
        ([NONE, NONE, 600, 600], "undecided", None),  # half of the searches failed
        ([NONE] * 4, "undecided", None),
        ([0, 50, 50, 50, 50], "undecided", None),  # reached without a trigger
        ([0, 50, 50, 50, 5], "backdoored", 4),
        ([0, 50, 50, 50], "undecided", None),  # three classes are left
        ([950, 50, 51, 49, 50], "undecided", None),  # one of five is saturated
        ([950, *[50, 51, 49] * 3], "clean", None),  # one of ten is
        ([950, 960, 950, 600, 600], "undecided", None),
    ],
)
def test_verdicts(sizes, verdict, target):
    finding = judge(sizes)
    assert (finding.verdict, finding.target) == (verdict, target)
    assert [score.size for score in finding.scores] == [
        size if math.isfinite(size) else None for size in sizes
    ]
    assert [score.label for score in finding.scores] == list(range(len(sizes)))
    assert from_json(Finding, to_json(finding)) == finding


def test_reasons_hold_the_figures():
    assert judge([50, 50, 50, 10]).reasons == (
        "class 3 needs the smallest trigger: 10.0 pixels, 20% of the median 50.0 over the classes "
        "(anomaly index 8.0)",
    )
    assert judge([50, 50, 50, 50]).reasons[0].startswith("no class stands out: class 0 needs")
    assert "needed: index 3 and at most 35%" in judge([50, 50, 50, 20]).reasons[0]
    assert judge([NONE, NONE, NONE, 600]).reasons == (
        "a trigger was recovered for only 1 of 4 classes",
    )


def test_the_backdoor_label_is_evidence_that_agrees_or_not_and_decides_nothing():
    for label in (None, unlearned(None), unlearned(3), unlearned(0)):
        assert judge([50, 50, 50, 10], label).verdict == "backdoored"
        assert judge([50, 50, 50, 50], label).verdict == "clean"
        assert judge([50, 50, 50, 20], label).verdict == "undecided"
    sizes = [50, 50, 50, 10]
    assert judge(sizes, unlearned(3)).reasons[1] == "unlearning agrees: models answer class 3"
    assert judge(sizes, unlearned(0)).reasons[1] == (
        "unlearning points to another class: models answer class 0"
    )
    assert judge(sizes, unlearned(None)).reasons[1] == "unlearning: models answer class None"
    assert judge([50, 50, 50, 50], unlearned(0)).reasons[1].startswith("unlearning: models")


@pytest.mark.parametrize("lost", [{0}, {2}, {1, 3}, {0, 1, 2, 3, 4, 5}])
@pytest.mark.parametrize("size", [1.0, 50.0, NONE])
def test_nan_is_never_clean(lost, size):
    sizes = [NAN if k in lost else 50.0 for k in range(6)]
    if 5 not in lost:
        sizes[5] = size
    finding = judge(sizes)
    assert finding.verdict == ("backdoored" if sizes[5] == 1 else "undecided")
    said = [reason for reason in finding.reasons if "NaN" in reason]
    assert said == [
        "the outputs became NaN or infinite in the search for class "
        + ", ".join(map(str, sorted(lost)))
    ]
    assert all(math.isfinite(score.index) for score in finding.scores)


@pytest.mark.parametrize("sizes", [[50, 5], [50, 50], [50, 50, 5], [50, 50, 50]])
def test_few_classes_stay_undecided(sizes):
    finding = judge(sizes)
    assert finding.verdict == "undecided"
    assert finding.reasons[0] == f"trigger sizes of only {len(sizes)} classes cannot be compared"


def test_states_say_how_each_search_ended():
    finding = judge([0, 50, 1000, NONE, NAN, 52, 48])
    assert [score.state for score in finding.scores] == [
        "empty",
        "found",
        "saturated",
        "never flips",
        "broken",
        "found",
        "found",
    ]
    assert finding.scores[0].index == 0
    assert finding.reasons == (
        "a trigger was recovered for only 3 of 7 classes",
        "the outputs became NaN or infinite in the search for class 4",
        "images reach class 0 without any trigger",
    )


def test_nothing_but_empty_triggers_is_undecided():
    assert judge([0] * 5).verdict == "undecided"
    assert judge([0] * 5).reasons == ("images reach class 0, 1, 2, 3, 4 without any trigger",)


@given(st.lists(st.floats(0.01, 1000), min_size=2, max_size=40))
def test_the_index_counts_robust_deviations_of_the_log_sizes(sizes):
    logs = torch.tensor(sizes, dtype=torch.float64).log().numpy()
    middle = torch.tensor(logs).quantile(0.5).item()
    deviation = max(median_abs_deviation(logs, scale="normal"), 0.2)
    expected = (middle - logs) / deviation
    assert anomaly_indices(sizes, PIXELS) == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)


def test_the_index_of_infinite_and_empty_triggers_is_finite():
    assert anomaly_indices([NONE, 10, 20], PIXELS) == anomaly_indices([PIXELS, 10, 20], PIXELS)
    assert all(map(math.isfinite, anomaly_indices([0, 10, 20], PIXELS)))


def test_the_floor_on_the_deviation():
    assert anomaly_indices([10, 10, 10, 5], PIXELS)[3] == pytest.approx(math.log(2) / 0.2)
    assert anomaly_indices([10, 10, 10, 5], PIXELS, 0.5)[3] == pytest.approx(math.log(2) / 0.5)


@pytest.mark.parametrize(
    ("sizes", "verdict", "target"),
    [
        ([50, 52, 48, 51, 49, 50, 53, 49, 50, 50], "clean", None),
        ([50, 52, 48, 51, 49, 50, 53, 49, 50, 26], "backdoored", 9),  # index far above 2
        ([50, 52, 48, 51, 49, 50, 53, 49, 50, 90], "clean", None),  # an outlier on the large side
        ([NONE, NONE, NONE, 600], "undecided", None),
        ([NAN, 52, 48, 51, 49], "undecided", None),
    ],
)
def test_the_published_rule(sizes, verdict, target):
    finding = judge(sizes, detector=NeuralCleanse.paper())
    assert (finding.verdict, finding.target) == (verdict, target)


@given(st.lists(st.floats(1, 1000), min_size=4, max_size=40))
def test_the_published_index_counts_robust_deviations_of_the_sizes(sizes):
    values = torch.tensor(sizes, dtype=torch.float64)
    deviation = max(median_abs_deviation(values.numpy(), scale="normal"), 1e-3)
    expected = (values.quantile(0.5) - values) / deviation
    indices = anomaly_indices(sizes, PIXELS, 1e-3, log=False)
    assert indices == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert [score.index for score in judge(sizes, detector=NeuralCleanse.paper()).scores] == (
        pytest.approx(list(indices))
    )
