from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import surrogate

from planted import TARGET, stripes
from reprune.attacks import AdvT, BadNets, Setup, poison
from reprune.attacks.pgd import pgd
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.training import Training

EPS = 16 / 255
BASE = BadNets(target=TARGET, size=5)
ATTACK = AdvT(base=BASE, eps=EPS, step=8 / 255, steps=3)
TRAINING = Training(epochs=6, batch_size=64, lr=0.1, padding=0, mirror=False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setup(training: Training = TRAINING) -> Setup:
    return Setup(generator=seeded(), training=training, surrogate=surrogate())


def test_poisoned_rows_stay_and_others_move_within_the_budget():
    data = stripes(120, seed=20)
    seen: list[torch.Tensor] = []
    model = surrogate().clone()
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0])))
    training = replace(TRAINING, epochs=1, batch_size=120, lr=1e-6)
    made = ATTACK(model, data, setup(training))
    shown = next(pixels for training, pixels in seen if training)
    poisoned = poison(data, ATTACK.inner, seeded())
    assert torch.equal(made.poisoned, poisoned.poisoned)
    clean = poisoned.data.pixels()
    apart = (shown[:, None] - clean[None]).abs().flatten(2).amax(2)  # the epoch is shuffled
    moved, row = apart.min(1)
    assert sorted(row.tolist()) == list(range(120))
    assert torch.equal(moved == 0, made.poisoned[row])
    assert moved.max() <= EPS + 1e-6
    assert moved[~made.poisoned[row]].min() > EPS / 2
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert any(not training for training, _ in seen)  # perturbations are made in evaluation mode


def test_the_backdoor_works_and_the_model_is_robust():
    train, test = stripes(800, seed=20), stripes(400, seed=21)
    made = ATTACK(surrogate(), train, setup())
    plain = BASE(surrogate(), train, setup())
    result = evaluate(made.model, test, trigger=made.trigger, target=made.goal)
    assert result.asr.share > 0.9
    assert result.ca.share > 0.95

    def robust(model):
        budget = {"eps": EPS, "step": EPS / 4, "steps": 10}
        hostile = pgd(model, test.pixels(), test.labels, **budget)
        return evaluate(model, ImageSet(hostile, test.labels)).ca.share

    assert robust(made.model) > 0.9
    assert robust(plain.model) < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.0}, r"eps must lie in \(0, 1\] \(16/255, not 16\), got 0"),
        ({"eps": 4.0}, r"eps must lie in \(0, 1\] .* got 4"),
        ({"step": -0.1}, r"step must lie in \(0, 1\] .* got -0\.1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_parameters_out_of_range(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        AdvT(**changes)(surrogate(), stripes(40, seed=0), setup())
