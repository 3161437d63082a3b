"""Shapley pruning: sampled values against enumerated ones, and the planted backdoor."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch
from quick import QUICK
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.defense import Clock
from reprune.defenses.coalition import Sampling, Value, shapley_values
from reprune.defenses.pruning import Fit
from reprune.defenses.shapley import ShapleyPruning, trigger_game
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.masks import ChannelMask, bake
from reprune.sites import find_sites
from reprune.types import silent

EXACT = Sampling(evaluations=8 * 500, per_order=8, resolution=0, discard=None, epsilon=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def enumerated(value: Value, players: int) -> Tensor:
    """Shapley values by their definition, over all coalitions."""
    worth = {}
    for size in range(players + 1):
        for members in combinations(range(players), size):
            keep = torch.zeros(players)
            keep[list(members)] = 1
            worth[frozenset(members)] = torch.tensor(value(keep), dtype=torch.float64)
    values = []
    for k in range(players):
        total = torch.zeros_like(worth[frozenset()])
        for members, alone in worth.items():
            if k not in members:
                weight = 1 / (players * math.comb(players - 1, len(members)))
                total += weight * (worth[members | {k}] - alone)
        values.append(total)
    return torch.stack(values)


def glove(keep: Tensor) -> tuple[float, ...]:
    """One left and two right gloves; a pair is worth 1. Shapley values 4/6, 1/6, 1/6."""
    left, *right = keep.tolist()
    return (min(left, sum(right)),)


def three_pairs(keep: Tensor) -> tuple[float, ...]:
    """Eight players, two figures: pairs that work together only, and a plain sum."""
    k = keep.tolist()
    together = 0.5 * k[0] * k[1] + 0.3 * k[2] * max(k[3], k[4]) + 0.2 * k[5] - 0.1 * k[6] * k[0]
    return together, sum(k) / 8


class Eight(nn.Module):
    """A convolution with 8 channels and a head, with weights from a fixed seed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded(parameter.numel()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().amax((2, 3)))


def network_game() -> Value:
    model = Classifier(Eight(), num_classes=3).eval()
    images = torch.rand(40, 1, 6, 6, generator=seeded())
    data = ImageSet(images, model(images).argmax(1))
    sites = find_sites(model, images[:2])
    fit = Fit(data, sites, Augmentation(padding=0), seeded(), silent, Clock())
    value = trigger_game(model, fit, data, lambda x: 1 - x, 0, shift=True)
    remembered = cache(lambda kept: value(torch.tensor(kept)))
    return lambda keep: remembered(tuple(keep.tolist()))


# --- sampled values ------------------------------------------------------------------------


def test_a_known_game():
    assert enumerated(glove, 3).flatten().tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    found = shapley_values(glove, 3, replace(EXACT, per_order=3), generator=seeded())
    assert found.flatten().tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=0.04)


@pytest.mark.parametrize("game", [three_pairs, network_game()])
def test_the_estimate_converges_to_the_enumerated_values(game):
    exact = enumerated(game, 8)
    errors = []
    for orders in (5, 500):
        settings = replace(EXACT, evaluations=8 * orders)
        found = shapley_values(game, 8, settings, weights=(1.0, 0.0), generator=seeded())
        errors.append(float((found - exact).abs().max()))
    assert errors[1] < 0.025
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("game", [three_pairs, network_game()])
@pytest.mark.parametrize("resolution", [0.0, 0.1, 9.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_contributions_add_up_to_the_worth_of_all(game, resolution, epsilon):
    """Efficiency; whatever is not looked into, and however the orders are drawn."""
    settings = replace(EXACT, evaluations=80, resolution=resolution, epsilon=epsilon)
    found = shapley_values(game, 8, settings, weights=(1.0, 0.0), generator=seeded())
    everything, nothing = (torch.tensor(game(torch.full((8,), x))) for x in (1.0, 0.0))
    assert found.sum(0).tolist() == pytest.approx((everything - nothing).tolist(), abs=1e-6)


def test_an_order_ends_where_the_first_figure_is_gone():
    def game(keep: Tensor) -> tuple[float, ...]:
        seen.append(int((keep == 0).sum()))
        return (float(keep.sum() > 60), 1.0)

    seen: list[int] = []
    settings = Sampling(evaluations=12, per_order=12, discard=0.0, epsilon=1)
    found = shapley_values(game, 64, settings, weights=(1.0, 0.0), generator=seeded())
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert (found[:, 0] > 0).sum() == 1
    assert float(found[:, 0].sum()) == 1


def test_few_evaluations_find_one_among_many():
    """Halving needs about two logarithms of the number of players."""
    settings = Sampling(evaluations=25, per_order=25, discard=None)
    found = shapley_values(lambda keep: (float(keep[777]),), 2000, settings, generator=seeded())
    assert found.flatten().nonzero().flatten().tolist() == [777]


def test_no_more_is_valued_than_allowed():
    calls: list[int] = []
    told: list[tuple[object, ...]] = []

    def game(keep: Tensor) -> tuple[float, ...]:
        calls.append(1)
        return (float(keep.mean()),)

    shapley_values(
        game,
        100,
        Sampling(evaluations=50, per_order=12, resolution=0),
        generator=seeded(),
        progress=lambda *call, **_: told.append(call),
    )
    assert told == [("shapley", k, 50) for k in range(1, 49)]
    assert len(calls) == 49


def test_greedy_orders_start_with_the_best_so_far():
    """Without exploring, the only player that matters leaves first in every later order."""
    seen: list[int] = []

    def game(keep: Tensor) -> tuple[float, ...]:
        if (keep == 0).sum() == 1:
            seen.append(int((keep == 0).nonzero()))
        return (float(keep[5]),)

    settings = replace(EXACT, evaluations=80, epsilon=0)
    shapley_values(game, 8, settings, generator=seeded())
    assert len(seen) == 10
    assert set(seen[1:]) == {5}


# --- the game ------------------------------------------------------------------------------


def test_the_game_counts_what_a_pruned_network_answers():
    """Independently: the channels baked away, and the rates by `evaluate`."""
    model, data = planted.model(True), planted.stripes(60, seed=6)
    others = data.subset((data.labels != planted.TARGET).nonzero().flatten())
    sites = find_sites(model, data.pixels(slice(0, 2)))
    fit = Fit(data, sites, Augmentation(padding=0), seeded(), silent, Clock())
    game = trigger_game(model, fit, others, planted.trigger(), planted.TARGET, shift=True)
    keep = torch.ones(64)
    keep[torch.tensor([13, 9, 20, 50])] = 0
    pruned = bake(model, ChannelMask.over(sites, keep.split([16, 24, 24]), shift=True))
    figures = evaluate(pruned, others, trigger=planted.trigger(), target=planted.TARGET)
    success, accuracy = game(keep)
    assert accuracy == pytest.approx(figures.ca.share)
    false_alarms = figures.predictions[planted.TARGET] / len(others)
    assert figures.asr.share - false_alarms - 1e-6 <= success <= figures.asr.share + 1e-6
    assert game(torch.ones(64)) == (1.0, 1.0)


def test_a_network_broken_down_to_the_class_is_no_success():
    model, data = planted.model(True).clone(), planted.stripes(60, seed=6)
    with torch.no_grad():
        model.network[-1].bias[planted.TARGET] = 1e3
    sites = find_sites(model, data.pixels(slice(0, 2)))
    fit = Fit(data, sites, Augmentation(padding=0), seeded(), silent, Clock())
    game = trigger_game(model, fit, data, planted.trigger(), planted.TARGET, shift=True)
    assert game(torch.ones(64))[0] == 0


# --- the method ----------------------------------------------------------------------------


def test_the_planted_backdoor_weakens_and_the_accuracy_holds():
    data, test = planted.stripes(300, seed=3), planted.stripes(400, seed=4)
    defense = ShapleyPruning(sampling=Sampling(evaluations=200))
    result = defense(planted.model(True), data, generator=seeded())
    figures = evaluate(result.model, test, trigger=planted.trigger(), target=planted.TARGET)
    assert figures.asr.share < 0.8  # from 1.0
    assert figures.ca.share > 0.97
    assert set(result.triggers) == {planted.TARGET}
    assert "smallest recovered trigger" in result.trace.notes[0]
    for site in result.trace.masks:
        for mask, score in zip(site.values, site.scores, strict=True):
            assert (mask < 1) == (score < 0)
        assert all(site.scores[k] < 0 for k in site.pruned)


def test_without_a_trigger_nothing_is_pruned(toy_model, toy_data):
    result = QUICK["shapley without a trigger"](toy_model, toy_data, generator=seeded())
    assert not result.mask.pruned()
    assert not result.triggers
    assert result.trace.notes == (
        "no trigger was recovered for any class: channels are ranked by clean accuracy",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"clean_weight": -1.0}, "clean_weight must be finite and at least 0, got -1.0"),
        ({"clean_weight": math.nan}, "clean_weight must be finite and at least 0, got nan"),
        ({"sampling": Sampling(evaluations=3)}, "got per_order 25 and evaluations 3"),
        ({"sampling": Sampling(resolution=-1)}, "resolution must be at least 0, got -1"),
        ({"sampling": Sampling(discard=2)}, r"discard must lie in \[0, 1\], got 2"),
        ({"sampling": Sampling(epsilon=-0.1)}, r"epsilon must lie in \[0, 1\], got -0.1"),
    ],
)
def test_settings_that_cannot_work(change, message, toy_model, toy_data):
    with pytest.raises(ConfigurationError, match=message):
        ShapleyPruning(**change)(toy_model, toy_data, generator=seeded())
