"""Metrics against independent implementations and hand-made counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprune.metrics import (
    brier_score,
    disagreement,
    histogram,
    paired_drop,
    wilson_interval,
)

COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
THREE = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50
)


@settings(deadline=None)  # the first call imports scipy
@given(COUNTS, st.floats(0.5, 0.999))
def test_wilson_interval_agrees_with_scipy(counts, confidence):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*counts, confidence) == pytest.approx(tuple(expected), abs=1e-9)


@given(COUNTS)
def test_wilson_interval_holds_the_share_and_stays_in_range(counts):
    hits, total = counts
    low, high = wilson_interval(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    assert (low == 0) == (hits == 0)
    assert (high == 1) == (hits == total)


@given(COUNTS)
def test_wilson_interval_mirrors(counts):
    hits, total = counts
    low, high = wilson_interval(hits, total)
    assert wilson_interval(total - hits, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_nothing_counted_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_more_images_and_less_confidence_narrow_the_interval():
    def width(*arguments: float) -> float:
        low, high = wilson_interval(*arguments)
        return high - low

    assert width(900, 1000) < width(90, 100) < width(9, 10)
    assert width(90, 100, 0.5) < width(90, 100, 0.95) < width(90, 100, 0.99)


def test_paired_drop_by_hand():
    labels = torch.tensor([0, 1, 2, 0])
    before = torch.tensor([0, 1, 2, 1])
    assert paired_drop(before, torch.tensor([0, 1, 2, 1]), labels) == 0
    assert paired_drop(before, torch.tensor([1, 1, 0, 2]), labels) == 0.5
    assert paired_drop(before, labels, labels) == -0.25
    assert paired_drop(before, torch.tensor([1, 1, 2, 0]), labels) == 0  # one lost, one won


@given(THREE)
def test_paired_drop_is_the_difference_of_the_accuracies(rows):
    before, after, labels = torch.tensor(rows).T
    accuracies = [float((p == labels).double().mean()) for p in (before, after)]
    drop = paired_drop(before, after, labels)
    assert drop == pytest.approx(accuracies[0] - accuracies[1], abs=1e-6)
    assert paired_drop(after, before, labels) == pytest.approx(-drop, abs=1e-6)
    assert abs(drop) <= disagreement(before, after) + 1e-6


def test_disagreement_counts_changed_answers_right_or_wrong():
    assert disagreement(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 1, 3])) == 0.5
    assert disagreement(torch.tensor([1, 1]), torch.tensor([1, 1])) == 0


def test_histogram_has_an_entry_for_every_class():
    assert histogram(torch.tensor([2, 0, 2]), 4) == [1, 0, 2, 0]
    assert histogram(torch.empty(0, dtype=torch.int64), 3) == [0, 0, 0]


def test_brier_score_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    assert brier_score(logits, torch.tensor([0, 1])) == pytest.approx((0.5 + 2 * 0.25**2) / 2)
    assert brier_score(torch.tensor([[-99.0, 99.0]]), torch.tensor([0])) == pytest.approx(2)
