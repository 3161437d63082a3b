"""What every detector promises, whatever its settings."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from dataclasses import replace

import pytest
import torch
from quick_detectors import QUICK, WILD
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection import DETECTORS, Detector, Scanned, make_detector
from reprune.errors import ConvergenceError, DataError, ModelError, UnknownNameError
from reprune.results import Finding, Trace, from_json, to_json


@pytest.fixture(params=QUICK)
def detector(request: pytest.FixtureRequest) -> Detector:
    return QUICK[request.param]


def run(detector: Detector, model: Classifier, data: ImageSet, seed: int = 0, **options) -> Scanned:
    return detector(model, data, generator=torch.Generator().manual_seed(seed), **options)


# --- names ---------------------------------------------------------------------------------


def test_every_name_makes_a_detector_that_can_work():
    for name in DETECTORS:
        detector = make_detector(name)
        detector.check()
        assert detector.title
        assert detector.source_paper
        assert "detection" in detector.gives
        assert detector.passes(500, 10) > 0
    with pytest.raises(UnknownNameError, match="unknown detector 'nuc'; known detectors: scan, nc"):
        make_detector("nuc")


# --- signature -----------------------------------------------------------------------------


def test_no_trigger_attack_or_target_can_enter(detector):
    parameters = list(inspect.signature(detector.__call__).parameters)
    assert parameters == ["model", "clean", "generator", "progress"]
    assert type(detector).__call__ is Detector.__call__
    for field in dataclasses.fields(detector):
        assert not any(word in field.name for word in ("trigger", "attack", "target", "poison"))


def test_a_detector_is_a_frozen_value(detector):
    assert detector == replace(detector)
    assert hash(detector) == hash(replace(detector))
    field = dataclasses.fields(detector)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(detector, field, None)


# --- outcome -------------------------------------------------------------------------------


def test_the_outcome_is_a_finding_with_its_evidence(detector, toy_model, toy_data):
    scanned = run(detector, toy_model, toy_data)
    assert scanned.finding.verdict in ("clean", "undecided", "backdoored")
    assert scanned.finding.reasons
    assert [score.label for score in scanned.finding.scores] == [0, 1, 2]
    assert (scanned.inverted is not None) == ("trigger" in detector.gives)
    for value in (scanned.finding, scanned.trace):
        text = json.dumps(to_json(value), allow_nan=False)
        assert from_json(type(value), json.loads(text)) == value
    assert isinstance(scanned.finding, Finding)
    assert isinstance(scanned.trace, Trace)


def test_the_generator_fixes_every_bit(detector, toy_model, toy_data):
    torch.manual_seed(1)
    first = run(detector, toy_model, toy_data)
    torch.manual_seed(2)
    again, other = run(detector, toy_model, toy_data), run(detector, toy_model, toy_data, seed=1)
    assert first.finding == again.finding
    assert replace(first.trace, seconds={}) == replace(again.trace, seconds={})
    if first.inverted is None:
        assert first.trace.phases != other.trace.phases
    else:
        assert torch.equal(first.inverted.masks, again.inverted.masks)
        assert torch.equal(first.inverted.patterns, again.inverted.patterns)
        assert not torch.equal(first.inverted.patterns, other.inverted.patterns)


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_untouched(detector, toy_model, toy_data, unchanged, training):
    model = copy.deepcopy(toy_model).train(training).requires_grad_(False)
    model.network[1].train(not training)
    model.network[0].weight.requires_grad_(True)
    images, before = toy_data.images.clone(), torch.get_rng_state()
    with unchanged(model):
        run(detector, model, toy_data)
    assert torch.equal(toy_data.images, images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_callers_model_is_untouched_after_an_exception(
    detector, toy_model, toy_data, unchanged, error
):
    """At the first and the last thing it reports."""
    calls: list[str] = []
    run(detector, toy_model, toy_data, progress=lambda phase, *_, **__: calls.append(phase))
    for position in (1, len(calls)):
        model, count = copy.deepcopy(toy_model).train(), 0

        def progress(*_: object, stop: int = position, **__: float) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise error("stopped midway")

        with unchanged(model), pytest.raises(error, match="stopped midway"):
            run(detector, model, toy_data, progress=progress)


# --- progress and cost ---------------------------------------------------------------------


def test_progress_is_told_of_every_phase(detector, toy_model, toy_data):
    told: list[tuple[str, int, int]] = []
    scanned = run(detector, toy_model, toy_data, progress=lambda *call, **_: told.append(call))
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases
    assert set(phases) >= set(scanned.trace.phases)
    for phase in phases:
        steps = [(done, total) for name, done, total in told if name == phase]
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] <= steps[-1][1]
    assert scanned.trace.seconds


def test_the_cost_is_what_it_says_at_most(detector, toy_model, toy_data):
    model, seen = copy.deepcopy(toy_model), []
    model.network[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    run(detector, model, toy_data)
    passes = sum(seen) / len(toy_data)
    said = detector.passes(len(toy_data), model.num_classes)
    assert passes <= said + 0.2
    assert passes >= said / 5


# --- refusals ------------------------------------------------------------------------------


def with_label(data: ImageSet, label: int) -> ImageSet:
    labels = data.labels.clone()
    labels[-1] = label
    return ImageSet(data.images, labels)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda d: with_label(d, 3), r"3 classes, labels 0\.\.2, but the data has the labels 3;"),
        (lambda d: d.subset(range(49)), "too few images: got 49, at least 50 are needed for 3"),
        (
            lambda d: ImageSet(d.images + 1, d.labels),
            r"must lie in \[0, 1\], got pixels from .* to",
        ),
    ],
)
def test_data_that_cannot_serve(detector, toy_model, toy_data, unchanged, broken, message):
    told: list[object] = []
    with unchanged(toy_model), pytest.raises(DataError, match=message):
        run(detector, toy_model, broken(toy_data), progress=lambda *c, **_: told.append(c))
    assert told == []


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), r"logits of shape \(90, 3\), got"),
        (nn.Sequential(nn.Flatten(), nn.Linear(99, 3)), r"fails on images of .* \(3, 12, 12\)"),
    ],
)
def test_models_that_cannot_be_examined(detector, toy_data, unchanged, network, message):
    model = Classifier(network, num_classes=3)
    with unchanged(model), pytest.raises(ModelError, match=message):
        run(detector, model, toy_data)


class Fragile(nn.Module):
    """Right on the images themselves; NaN as soon as gradients pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.mean((2, 3)))
        return logits * float("nan") if torch.is_grad_enabled() else logits


def test_nan_is_never_clean(detector, toy_data):
    """Either the method says that it diverged, or it is undecided."""
    model = Classifier(Fragile(), num_classes=3)
    try:
        finding = run(detector, model, toy_data).finding
    except ConvergenceError as error:
        assert "diverged" in str(error)  # noqa: PT017
    else:
        assert finding.verdict == "undecided"


@pytest.mark.parametrize("name", WILD)
def test_divergence_is_a_convergence_error(name, toy_model, toy_data, unchanged):
    with unchanged(toy_model), pytest.raises(ConvergenceError, match="diverged in epoch 1: the"):
        run(WILD[name], toy_model, toy_data)


def test_uint8_images_serve_as_well(detector, toy_model, toy_data):
    data = ImageSet((toy_data.images * 255).round().byte(), toy_data.labels)
    assert run(detector, toy_model, data).finding.reasons
