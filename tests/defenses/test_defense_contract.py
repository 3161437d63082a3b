"""What every defence promises, whatever its settings."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from quick import QUICK, WILD
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense, Purified
from reprune.defenses.clp import CLP
from reprune.defenses.nad import NAD
from reprune.defenses.onp import ONP
from reprune.errors import ConvergenceError, DataError, ModelError
from reprune.evaluation import predict
from reprune.results import Trace, from_json, to_json


@pytest.fixture(params=QUICK)
def defense(request: pytest.FixtureRequest) -> Defense:
    return QUICK[request.param]


def run(defense: Defense, model: Classifier, data: ImageSet, seed: int = 0, **options) -> Purified:
    return defense(model, data, generator=torch.Generator().manual_seed(seed), **options)


def with_labels(data: ImageSet, label: int) -> ImageSet:
    labels = data.labels.clone()
    labels[-1] = label
    return ImageSet(data.images, labels)


def with_pixel(data: ImageSet, value: float) -> ImageSet:
    images = data.images.clone()
    images[4, 0, 0, 0] = value
    return ImageSet(images, data.labels)


class Scrambled(nn.Module):
    """Answers that have nothing to do with the image (logits up to 2: no probabilities)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3))

    def forward(self, x: Tensor) -> Tensor:
        noise = (x.flatten(1).sum(1) * 1e4).long() % 3
        return self.layers(x) * 1e-9 + 2 * nn.functional.one_hot(noise, 3)


# --- signature -----------------------------------------------------------------------------


def test_no_trigger_attack_or_target_can_enter(defense):
    assert list(inspect.signature(defense.__call__).parameters) == [
        "model",
        "clean",
        "generator",
        "progress",
    ]
    assert type(defense).__call__ is Defense.__call__
    for field in dataclasses.fields(defense):
        assert not any(word in field.name for word in ("trigger", "attack", "target", "poison"))


def test_a_defence_is_a_frozen_value(defense):
    assert defense == replace(defense)
    assert hash(defense) == hash(replace(defense))
    field = dataclasses.fields(defense)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(defense, field, None)


# --- outcome -------------------------------------------------------------------------------


def test_the_outcome_is_a_new_model_with_its_evidence(defense, toy_model, toy_data):
    result = run(defense, toy_model, toy_data)
    assert result.model is not toy_model
    own = {parameter.data_ptr() for parameter in toy_model.parameters()}
    for model in (result.model, *result.stages.values()):
        assert not any(module.training for module in model.modules())
        assert own.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
        assert predict(model, toy_data).isfinite().all()
        assert model.state_dict().keys() == toy_model.state_dict().keys()
    parameters = dict(result.model.network.named_parameters())
    for name, channels in result.mask.pruned().items():
        assert (parameters[name][channels] == 0).all()
    text = json.dumps(to_json(result.trace), allow_nan=False)
    assert from_json(Trace, json.loads(text)) == result.trace


def test_the_generator_fixes_every_bit(defense, toy_model, toy_data):
    first, again = run(defense, toy_model, toy_data), run(defense, toy_model, toy_data)
    other = run(defense, toy_model, toy_data, seed=1)
    states = [result.model.state_dict() for result in (first, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(first.mask[name], again.mask[name]) for name in first.mask)
    traces = [replace(result.trace, seconds={}) for result in (first, again, other)]
    assert traces[0] == traces[1]
    assert traces[0] != traces[2] or isinstance(defense, CLP)  # it draws only who judges


class Dropping(nn.Module):
    """The toy network with dropout before its head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.body, self.head = copy.deepcopy(network[:-1]), copy.deepcopy(network[-1])
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(x)))


def test_dropout_draws_from_the_generator_too(defense, toy_model, toy_data):
    model = Classifier(Dropping(toy_model.network), (0.5,), (0.25,), num_classes=3)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        results.append(run(defense, model, toy_data))
    assert replace(results[0].trace, seconds={}) == replace(results[1].trace, seconds={})


# --- what stays as it was ------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_untouched(defense, toy_model, toy_data, unchanged, training):
    model = copy.deepcopy(toy_model).train(training).requires_grad_(False)
    model.network[1].train(not training)
    model.network[0].weight.requires_grad_(True)
    model.network[2].register_forward_hook(lambda *_: None)
    images = toy_data.images.clone()
    with unchanged(model):
        run(defense, model, toy_data)
    assert torch.equal(toy_data.images, images)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_callers_model_is_untouched_after_an_exception(
    defense, toy_model, toy_data, unchanged, error
):
    """At the first, a middle and the last thing it reports."""
    calls: list[str] = []
    run(defense, toy_model, toy_data, progress=lambda phase, *_, **__: calls.append(phase))
    for position in (1, len(calls) // 2, len(calls)):
        model = copy.deepcopy(toy_model).train()
        count = 0

        def progress(*_: object, stop: int = position, **__: float) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise error("stopped midway")

        before = torch.get_rng_state()
        with unchanged(model), pytest.raises(error, match="stopped midway"):
            run(defense, model, toy_data, progress=progress)
        assert torch.equal(torch.get_rng_state(), before)


def test_process_wide_states_are_left_alone(defense, toy_model, toy_data):
    def states() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        )

    before = states()
    run(defense, toy_model, toy_data)
    assert states() == before


# --- progress ------------------------------------------------------------------------------


def test_progress_is_told_of_every_phase(defense, toy_model, toy_data):
    told: list[tuple[str, int, int]] = []
    result = run(defense, toy_model, toy_data, progress=lambda *call, **_: told.append(call))
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases
    assert set(phases) >= set(result.trace.phases)
    for phase in phases:
        steps = [(done, total) for name, done, total in told if name == phase]
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] <= steps[-1][1]


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda d: with_labels(d, 3), r"3 classes, labels 0\.\.2, but the data has the labels 3;"),
        (lambda d: with_labels(d, -1), r"labels 0\.\.2, but the data has the labels -1;"),
        (lambda d: d.subset(range(49)), "too few images: got 49, at least 50 are needed for 3"),
        (lambda d: d.subset(range(0)), "too few images: got 0"),
        (
            lambda d: d.subset((d.labels > 0).nonzero().flatten()),
            "1 of 3 classes have no image: 0; at least 1 of each class needed",
        ),
        (lambda d: with_pixel(d, torch.nan), "1 of 90 images .* NaN or infinite: images 4;"),
        (lambda d: with_pixel(d, 2.0), r"must lie in \[0, 1\], got pixels from .* to 2"),
        (
            lambda d: ImageSet(torch.zeros_like(d.images), d.labels),
            "90 of 90 images are a single colour",
        ),
    ],
)
def test_data_that_cannot_serve(defense, toy_model, toy_data, unchanged, broken, message):
    told: list[object] = []
    with unchanged(toy_model), pytest.raises(DataError, match=message):
        run(defense, toy_model, broken(toy_data), progress=lambda *c, **_: told.append(c))
    assert told == []  # refused before any work


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Scrambled(), "the model is at chance on this data"),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), r"logits of shape \(90, 3\), got"),
        (nn.Sequential(nn.Flatten(), nn.Linear(99, 3)), r"fails on images of .* \(3, 12, 12\)"),
    ],
)
def test_models_that_cannot_be_defended(defense, toy_data, unchanged, network, message):
    model = Classifier(network, num_classes=3)
    with unchanged(model), pytest.raises(ModelError, match=message):
        run(defense, model, toy_data)


class Brightest(nn.Module):
    """Right without any channel that could be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def test_a_model_without_channels(defense, toy_data):
    """Methods that prune or look at maps say why they cannot; the others do what they do."""
    model = Classifier(Brightest(), num_classes=3)
    told: list[object] = []
    if isinstance(defense, ONP):
        assert not run(defense, model, toy_data).trace.repaired
        return
    if not hasattr(defense, "pruning") and not isinstance(defense, NAD):
        assert predict(run(defense, model, toy_data).model, toy_data).isfinite().all()
        return
    message = "no prunable channel: it needs at least one convolution|no two layers that give maps"
    with pytest.raises(ModelError, match=message):
        run(defense, model, toy_data, progress=lambda *c, **_: told.append(c))
    assert told == []


@pytest.mark.parametrize("name", WILD)
def test_divergence_is_a_convergence_error(name, toy_model, toy_data, unchanged):
    with unchanged(toy_model), pytest.raises(ConvergenceError, match="diverged in epoch 1: the"):
        run(WILD[name], toy_model, toy_data)


def test_the_cost_is_what_it_says_at_most(defense, toy_model, toy_data):
    """Images through the network, counted."""
    model, seen = copy.deepcopy(toy_model), []
    model.network[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    run(defense, model, toy_data)
    passes = sum(seen) / len(toy_data)
    said = defense.passes(len(toy_data), model.num_classes)
    assert passes <= said + 0.2
    assert passes >= said / 5


def test_uint8_images_serve_as_well(defense, toy_model, toy_data):
    data = ImageSet((toy_data.images * 255).round().byte(), toy_data.labels)
    assert run(defense, toy_model, data).model.state_dict().keys()
    assert data.images.dtype == torch.uint8
