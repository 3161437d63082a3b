"""The variants of the paper that are settings of BadNets and Blend (RNP, Tables 10 to 12)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import surrogate

from planted import TARGET, stripes
from reprune.attacks import BadNets, Blend, Goal, Setup, poison
from reprune.data import ImageSet
from reprune.evaluation import evaluate
from reprune.training import Training


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def many() -> ImageSet:
    """10,000 grey images of 10 classes: every pixel of a grid differs from them. Do not change."""
    return ImageSet(torch.full((10_000, 3, 32, 32), 128).byte(), torch.arange(10_000) % 10)


@pytest.mark.parametrize(
    ("rate", "count"), [(0.1, 1000), (0.05, 500), (0.01, 100), (0.005, 50)], ids=str
)
@pytest.mark.parametrize("size", [3, 5, 10])
def test_badnets_poisons_the_stated_share_with_a_grid_of_the_stated_size(rate, count, size):
    made = poison(many(), BadNets(rate=rate, size=size), seeded())
    changed = made.data.images != many().images
    rows = changed.flatten(1).any(1)
    assert int(rows.sum()) == count
    assert torch.equal(rows, made.poisoned)
    square = torch.zeros(3, 32, 32, dtype=torch.bool)
    square[:, -size:, -size:] = True
    assert torch.equal(changed[rows], square.expand(count, -1, -1, -1))
    assert (made.data.labels[rows] == 0).all()
    assert torch.equal(made.data.labels[~rows], many().labels[~rows])
    assert (torch.bincount(many().labels[rows], minlength=10) > 0).all()


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(all_to_all=True, size=5, rate=0.3, target=TARGET),
        Blend(all_to_all=True, alpha=0.4, rate=0.3, target=TARGET),
    ],
    ids=["badnets", "blend"],
)
def test_all_to_all_is_learned_and_measured(attack):
    training = Training(epochs=10, batch_size=64, lr=0.1, padding=0, mirror=False)
    setup = Setup(generator=seeded(), training=training)
    made = attack(surrogate(), stripes(1600, seed=20), setup)
    test = stripes(400, seed=21)
    result = evaluate(made.model, test, trigger=made.trigger, target=Goal(None))
    assert made.goal == Goal(None)
    assert result.asr.share > 0.9
    assert result.asr.total == 400  # every class is a victim
    assert result.ca.share > 0.95
    to_one = evaluate(made.model, test, trigger=made.trigger, target=TARGET)
    assert to_one.asr.share < 0.45  # a third of the others goes there, and no more
    clean = evaluate(surrogate(), test, trigger=made.trigger, target=Goal(None))
    assert clean.asr.share < 0.3
