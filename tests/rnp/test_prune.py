"""Pruning: which channels go, how many evaluations it costs, and what the judge measures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError
from reprune.masks import bake
from reprune.results import PruningPoint
from reprune.rnp import Judge, Pruning, prune
from reprune.sites import find_sites


class FakeJudge:
    """Judges by a function of the channel count; checks that the count is what was pruned."""

    def __init__(self, drop, labels: Tensor | None = None) -> None:
        labels = torch.tensor([0, 1]) if labels is None else labels
        self.drop, self.before, self.data = drop, labels, SimpleNamespace(labels=labels)
        self.asked: list[int] = []

    def __call__(self, repaired: Classifier, *, threshold: float, channels: int) -> PruningPoint:
        zero = sum(
            int((module.weight == 0).sum())
            for module in repaired.network.modules()
            if isinstance(module, nn.BatchNorm2d)
        )
        assert zero == channels
        self.asked.append(channels)
        return PruningPoint(threshold, channels, 1.0, self.drop(channels), 0.0)


def network(*widths: int) -> tuple[Classifier, tuple]:
    """A chain of 1x1 convolutions with norms, and its sites."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 1
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        nn.init.uniform_(layers[-2].bias, 0.5, 1)
        inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 2)]
    model = Classifier(nn.Sequential(*layers), num_classes=2).eval()
    return model, find_sites(model, torch.rand(2, 1, 2, 2))


def rising(count: int) -> list[Tensor]:
    return [torch.arange(count) / count]


# --- dynamic -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 5])
def test_dynamic_finds_the_largest_prune_within_the_budget(channels):
    """On few channels exactly, wherever the budget ends."""
    model, sites = network(max(channels, 1))
    scores = [rising(max(channels, 1))[0] + (channels == 0)]
    for largest in range(channels + 1):
        judge = FakeJudge(lambda n, top=largest: 0.0 if n <= top else 0.5)
        result = prune(model, sites, scores, Pruning(max_accuracy_drop=0.1), judge)
        assert result.curve[result.chosen].channels == largest
        assert int(sum((v == 0).sum() for v in result.values)) == largest


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("channels", [7, 40, 300])
def test_dynamic_keeps_to_its_evaluations_and_its_budget(channels, evaluations):
    model, sites = network(channels)
    for largest in (0, 1, channels // 3, channels - 1, channels):
        judge = FakeJudge(lambda n, top=largest: n / 1000 if n <= top else 0.9)
        settings = Pruning(max_accuracy_drop=0.3, max_evaluations=evaluations)
        result = prune(model, sites, rising(channels), settings, judge)
        assert len(judge.asked) <= evaluations
        assert len(set(judge.asked)) == len(judge.asked)
        chosen = result.curve[result.chosen]
        assert chosen.channels <= largest
        assert chosen.drop <= 0.3
        refused = [n for n in judge.asked if n > chosen.channels]
        assert all(n > largest for n in refused)
        if largest == channels and evaluations > 1:
            assert chosen.channels == channels


@pytest.mark.parametrize(("budget", "pruned"), [(0.0, 2), (0.25, 3), (1.0, 5)])
def test_the_budget_is_inclusive(budget, pruned):
    model, sites = network(5)
    judge = FakeJudge({0: 0.0, 1: -0.1, 2: 0.0, 3: 0.25, 4: 0.5, 5: 1.0}.get)
    result = prune(model, sites, rising(5), Pruning(max_accuracy_drop=budget), judge)
    assert result.curve[result.chosen].channels == pruned


def test_only_scores_below_the_candidate_bound_are_candidates():
    model, sites = network(6)
    scores = [torch.tensor([0.2, 1.0, 0.4, 1.0, 1.5, 0.1])]
    for bound, expected in (
        (1.0, {0, 2, 5}),
        (0.4, {0, 5}),
        (0.05, set()),
        (math.inf, set(range(6))),
    ):
        result = prune(model, sites, scores, Pruning(candidates=bound), FakeJudge(lambda n: 0.0))
        zero = {i for i, v in enumerate(result.values[0].tolist()) if v == 0}
        assert zero == expected


def test_without_candidates_nothing_is_judged():
    model, sites = network(4)
    judge = FakeJudge(lambda n: 0.0)
    result = prune(model, sites, [torch.ones(4)], Pruning(), judge)
    assert judge.asked == []
    assert [point.channels for point in result.curve] == [0]
    assert result.chosen == 0
    assert result.mask.pruned() == {}


def test_the_curve_rises_and_starts_at_the_original():
    model, sites = network(40)
    judge = FakeJudge(lambda n: n / 100)
    judge.before = torch.tensor([0, 0])  # half right
    result = prune(model, sites, rising(40), Pruning(max_accuracy_drop=0.1), judge)
    counts = [point.channels for point in result.curve]
    assert counts == sorted({0, *judge.asked})
    first = result.curve[0]
    assert (first.channels, first.accuracy, first.drop, first.disagreement) == (0, 0.5, 0, 0)
    assert first.threshold == -math.inf
    for point in result.curve[1:]:
        assert point.threshold == pytest.approx((point.channels - 1) / 40)


# --- threshold, fraction, count ------------------------------------------------------------

SCORES = [torch.tensor([0.3, 0.0, 0.9]), torch.tensor([0.5, 0.3, 0.1, 1.0])]


@pytest.mark.parametrize(
    ("by", "amount", "expected"),
    [
        ("threshold", 0.3, ([0, 1], [1, 2])),  # at most: a score of exactly 0.3 goes
        ("threshold", 0.29, ([1], [2])),
        ("threshold", 0.0, ([1], [])),
        ("threshold", 1.0, ([0, 1, 2], [0, 1, 2, 3])),
        ("fraction", 0.0, ([], [])),
        ("fraction", 3 / 7, ([0, 1], [2])),
        ("fraction", 1.0, ([0, 1, 2], [0, 1, 2, 3])),
        ("count", 0, ([], [])),
        ("count", 2, ([1], [2])),
        ("count", 3, ([0, 1], [2])),  # of equal scores the first in the network goes first
        ("count", 99, ([0, 1, 2], [0, 1, 2, 3])),
    ],
)
def test_what_goes(by, amount, expected):
    model, sites = network(3, 4)
    judge = FakeJudge(lambda n: 1.0)
    result = prune(model, sites, SCORES, Pruning(by=by, amount=amount), judge)
    got = tuple((value == 0).nonzero().flatten().tolist() for value in result.values)
    assert got == expected
    assert all(set(value.tolist()) <= {0.0, 1.0} for value in result.values)
    count = sum(map(len, expected))
    assert judge.asked == ([count] if count else [])
    assert result.curve[result.chosen].channels == count


@pytest.mark.parametrize("shift", [True, False])
def test_shift_says_whether_the_constant_stays(shift):
    model, sites = network(3, 4)
    settings = Pruning(by="count", amount=2, shift=shift)
    mask = prune(model, sites, SCORES, settings, FakeJudge(lambda n: 0.0)).mask
    assert set(mask) == {"1.weight", "4.weight"} | ({"1.bias", "4.bias"} if shift else set())
    baked = bake(model, mask)
    assert baked.network[1].weight[1] == 0
    assert (baked.network[1].bias[1] == 0) == shift
    assert model.network[1].weight[1] != 0


def test_progress_hears_of_every_candidate():
    model, sites = network(40)
    told = []
    prune(
        model,
        sites,
        rising(40),
        Pruning(max_evaluations=6),
        judge := FakeJudge(lambda n: n / 100),
        progress=lambda *call, **figures: told.append((call, figures)),
    )
    assert [call for call, _ in told] == [("prune", i + 1, 6) for i in range(len(judge.asked))]
    assert [figures["channels"] for _, figures in told] == judge.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "luck"}, "by must be dynamic, threshold, fraction or count, got 'luck'"),
        ({"by": "count"}, "pruning by count needs an amount >= 0, got None"),
        ({"by": "threshold", "amount": -0.1}, "pruning by threshold needs an amount >= 0, got -0"),
        ({"by": "fraction", "amount": 1.5}, r"a fraction must lie in \[0, 1\], got 1.5"),
        ({"max_accuracy_drop": 2}, r"max_accuracy_drop must lie in \[0, 1\], got 2"),
        ({"max_accuracy_drop": -0.1}, r"max_accuracy_drop must lie in \[0, 1\], got -0.1"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    model, sites = network(3, 4)
    judge = FakeJudge(lambda n: 0.0)
    with pytest.raises(ConfigurationError, match=message):
        prune(model, sites, SCORES, Pruning(**settings), judge)
    assert judge.asked == []


# --- the judge -----------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = nn.Parameter(nn.functional.one_hot(torch.tensor(answer), 3).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.expand(len(x), 3)


def always(answer: int) -> Classifier:
    return Classifier(Constant(answer), num_classes=3)


HELD_OUT = ImageSet(torch.rand(5, 1, 4, 4), torch.tensor([0, 0, 0, 1, 2]))


def judge_of(model: Classifier, budget: int) -> Judge:
    return Judge(
        model,
        HELD_OUT,
        budget=budget,
        augmentation=Augmentation(1),
        generator=torch.Generator().manual_seed(0),
    )


def test_the_judge_compares_with_the_original_image_by_image():
    judge = judge_of(always(0), 5)
    point = judge(always(1), threshold=0.4, channels=7)
    assert (point.threshold, point.channels) == (0.4, 7)
    assert point.accuracy == pytest.approx(1 / 5)
    assert point.drop == pytest.approx(2 / 5)
    assert point.disagreement == 1
    same = judge(always(0), threshold=0.1, channels=1)
    assert (same.drop, same.disagreement) == (0, 0)
    assert judge.evaluations == 2


@pytest.mark.parametrize(("budget", "copies"), [(1, 1), (5, 1), (9, 1), (10, 2), (17, 3)])
def test_the_judge_adds_augmented_copies_up_to_its_budget(budget, copies):
    judge = judge_of(always(0), budget)
    assert len(judge.data) == 5 * copies
    assert judge.data.labels.tolist() == [0, 0, 0, 1, 2] * copies
    assert torch.equal(judge.data.images[:5], HELD_OUT.images)
    if copies > 1:
        assert not torch.equal(judge.data.images[5:10], HELD_OUT.images)
    assert len(judge.before) == 5 * copies
    assert judge.evaluations == 0
