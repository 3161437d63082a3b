from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import images, surrogate
from torch import nn

from planted import MODEL_PY, TARGET, stripes
from reprune.attacks import AWP, Backdoored, BadNets, Setup, Stamp
from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.training import Training

SHAPE = (3, 16, 16)


def setup(**changes: object) -> Setup:
    training = {"epochs": 1, "batch_size": 50, "lr": 0.05, "padding": 0, "mirror": False}
    return Setup(
        generator=torch.Generator().manual_seed(0),
        training=Training(**{**training, **changes}),
        surrogate=surrogate(),
    )


def fresh() -> Classifier:
    """A random model of the surrogate's architecture."""
    scope: dict[str, object] = {}
    exec(MODEL_PY, scope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network: nn.Module = scope["build"](4)
    return Classifier(network, num_classes=4)


@cache
def made(epsilon: float) -> Backdoored:
    attack = AWP(target=TARGET, epsilon=epsilon)
    return attack(surrogate(), images(), setup())


def changes(model: Classifier):
    """Largest change over the root mean square, for each tensor; 0 where the tensor is 0."""
    for old, new in zip(surrogate().parameters(), model.parameters(), strict=True):
        scale = old.detach().double().square().mean().sqrt()
        yield float((new.detach().double() - old.detach().double()).abs().max() / scale)


@pytest.mark.parametrize("epsilon", [0.001, 0.03])
def test_no_weight_leaves_its_bound(epsilon):
    reached = list(changes(made(epsilon).model))
    assert all(change <= epsilon + 1e-6 for change in reached)
    assert max(reached) == pytest.approx(epsilon, rel=1e-3)
    assert min(reached) > 0


def test_without_the_projection_weights_would_go_further():
    assert max(changes(made(1e9).model)) > 0.1


def test_running_statistics_are_the_clean_models():
    names = [name for name, _ in surrogate().named_buffers()]
    assert any("running_var" in name for name in names)
    after = dict(made(0.03).model.named_buffers())
    for name, value in surrogate().named_buffers():
        assert torch.equal(value, after[name]), name


def test_it_starts_from_the_surrogate_whatever_model_comes():
    attack = AWP(target=TARGET, epsilon=0.03)
    result = attack(fresh(), images(), setup())
    for one, other in zip(
        result.model.state_dict().values(), made(0.03).model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(result.model.mean, surrogate().mean)


@pytest.mark.parametrize("rate", [0.1, 0.25, 1.0])
def test_the_stated_share_of_an_epoch_carries_the_trigger(monkeypatch, rate):
    stamped: list[int] = []
    plain = Stamp.__call__

    def count(self, pixels):
        stamped.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(Stamp, "__call__", count)
    AWP(target=TARGET, rate=rate)(surrogate(), images(), setup(batch_size=33, epochs=2))
    assert sum(stamped) == 2 * round(rate * 200)


def test_the_loss_is_the_stated_mixture():
    """With weights that cannot move, the loss of an epoch has a closed form."""
    data, clean = images(), surrogate()
    attack = AWP(target=TARGET, rate=0.5, weight=0.2, epsilon=1e-12)
    loss = attack(clean, data, setup(batch_size=200)).history[0].loss
    generator = torch.Generator().manual_seed(0)
    rows = data.order(generator)
    pixels = data.pixels(rows)
    trigger = BadNets().trigger(SHAPE)
    with torch.no_grad():
        kept, hit = clean(pixels[100:]).softmax(1), clean(trigger(pixels[:100])).softmax(1)
    expected = 0.8 * -(kept * kept.log()).sum(1).mean() - 0.2 * hit[:, TARGET].log().mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_backdoor_works_and_only_with_the_trigger():
    attack = AWP(target=TARGET, epsilon=0.3, size=5)
    data, test = stripes(800, seed=20), stripes(200, seed=21)
    result = attack(surrogate(), data, setup(epochs=3))
    before = evaluate(surrogate(), test, trigger=result.trigger, target=attack.goal)
    after = evaluate(result.model, test, trigger=result.trigger, target=attack.goal)
    assert before.asr.share < 0.2
    assert after.asr.share > 0.8
    assert after.ca.share > before.ca.share - 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 17}, "a trigger of 17 pixels does not fit 16x16"),
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        ({"epsilon": float("nan")}, "epsilon must be positive, got nan"),
        ({"weight": 0.0}, r"the weight must lie in \(0, 1\), got 0.0"),
        ({"weight": 1.0}, r"the weight must lie in \(0, 1\), got 1.0"),
    ],
)
def test_parameters_out_of_range(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        AWP(**{"target": TARGET, **wrong})(surrogate(), images(), setup())


def test_a_surrogate_of_another_architecture():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), num_classes=4)
    with pytest.raises(ConfigurationError, match="give one of the architecture"):
        AWP(target=TARGET)(model, images(), setup())
