"""What every filter promises, whatever its settings."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from corner import QUICK
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection.filtering import Filter, Filtered
from reprune.detection.filters import FILTERS, make_filter
from reprune.detection.spectral import SpectralSignatures
from reprune.detection.strip import STRIP
from reprune.errors import ConfigurationError, DataError, ModelError, UnknownNameError
from reprune.results import Trace, from_json, to_json


@pytest.fixture(params=QUICK)
def detector(request: pytest.FixtureRequest) -> Filter:
    return QUICK[request.param]


def run(detector: Filter, model: Classifier, data: ImageSet, seed: int = 0, **options) -> Filtered:
    clean = None if "training data" in detector.needs else data
    generator = torch.Generator().manual_seed(seed)
    return detector(model, data, clean, generator=generator, **options)


def test_scores_flags_and_evidence(detector, toy_model, toy_data):
    found = run(detector, toy_model, toy_data)
    assert found.scores.shape == found.flagged.shape == (len(toy_data),)
    assert found.scores.dtype == torch.float32
    assert found.flagged.dtype == torch.bool
    assert found.scores.isfinite().all()
    assert found.reasons
    if found.threshold is not None:
        assert torch.equal(found.flagged, found.scores > found.threshold)
        assert len(found.clean_scores)
    text = json.dumps(to_json(found.trace), allow_nan=False)
    assert from_json(Trace, json.loads(text)) == found.trace
    assert found.trace.seconds


def test_the_generator_fixes_every_bit(detector, toy_model, toy_data):
    first, again = run(detector, toy_model, toy_data), run(detector, toy_model, toy_data)
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(first.flagged, again.flagged)
    assert first.threshold == again.threshold


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_untouched(detector, toy_model, toy_data, unchanged, training):
    model = copy.deepcopy(toy_model).train(training).requires_grad_(False)
    model.network[1].train(not training)
    model.network[2].register_forward_hook(lambda *_: None)
    images = toy_data.images.clone()
    with unchanged(model):
        run(detector, model, toy_data)
    assert torch.equal(toy_data.images, images)


def test_the_callers_model_is_untouched_after_an_exception(
    detector, toy_model, toy_data, unchanged
):
    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("stop")

    model = copy.deepcopy(toy_model).train()
    with unchanged(model), pytest.raises(RuntimeError, match="stop"):
        run(detector, model, toy_data, progress=stop)


def test_progress_counts_up_to_a_fixed_total(detector, toy_model, toy_data):
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(phase: str, done: int, total: int, /, **_: float) -> None:
        told.setdefault(phase, []).append((done, total))

    found = run(detector, toy_model, toy_data, progress=progress)
    assert set(found.trace.phases) <= set(told)
    for steps in told.values():
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] == steps[-1][1]


def test_the_cost_is_what_is_said(detector, toy_model, toy_data):
    model, seen = copy.deepcopy(toy_model), []
    model.network[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    run(detector, model, toy_data)
    said = detector.passes(len(toy_data), 3)
    assert said / 5 <= sum(seen) / len(toy_data) <= said + 0.2


@pytest.mark.parametrize("name", ["strip", "strip:paper", "spectral", "clustering"])
def test_an_image_without_a_score_is_flagged(name, toy_model, toy_data):
    detector = QUICK[name]
    images = toy_data.images.clone()
    images[7] = float("nan")
    spoiled = ImageSet(images, toy_data.labels)
    with toy_model.evaluating():
        found = detector.judge(
            toy_model,
            spoiled,
            toy_data,
            generator=torch.Generator().manual_seed(0),
            progress=lambda *_, **__: None,
        )
    assert found.scores[7].isnan()
    assert found.flagged[7]
    assert found.scores.isnan().sum() == 1
    assert any("could not be decided" in reason for reason in found.reasons)


def test_a_filter_is_a_frozen_value_that_no_trigger_can_enter(detector):
    assert hash(detector) == hash(replace(detector))
    assert type(detector).__call__ is Filter.__call__
    for field in dataclasses.fields(detector):
        assert not any(word in field.name for word in ("trigger", "attack", "target", "poison"))


def test_a_model_at_chance_is_refused(detector, toy_model, toy_data):
    labels = toy_data.labels[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(ModelError, match="at chance"):
        run(detector, toy_model, ImageSet(toy_data.images, labels))


def test_labels_outside_the_classes_are_refused(detector, toy_model, toy_data):
    labels = toy_data.labels.clone()
    labels[-1] = 3
    with pytest.raises(DataError, match="the model has 3 classes"):
        run(detector, toy_model, ImageSet(toy_data.images, labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlays": 0}, "overlays must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"false_rejection": 0.0}, r"false_rejection must lie in \(0, 1\), got 0.0"),
        ({"blend": "max"}, "blend must be one of"),
        ({"threshold": "guess"}, "threshold must be one of"),
        ({"holdout": 1.0}, r"holdout must lie in \(0, 1\), got 1.0"),
        ({"rate": 0.0}, r"rate must lie in \(0, 1\), got 0.0"),
        ({"rate": 0.9}, r"factor \* rate must lie in \(0, 1\], got 1.5 \* 0.9"),
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"size": 0.6}, r"size must lie in \(0, 0.5\], got 0.6"),
        ({"silhouette": 2.0}, r"silhouette must lie in \[-1, 1\], got 2.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message, toy_model, toy_data):
    kinds = {
        field.name: kind for kind in map(type, QUICK.values()) for field in dataclasses.fields(kind)
    }
    with pytest.raises(ConfigurationError, match=message):
        run(kinds[next(iter(settings))](**settings), toy_model, toy_data)


def test_clean_images_are_needed(toy_model, toy_data, generator):
    with pytest.raises(ConfigurationError, match="STRIP needs clean images"):
        STRIP()(toy_model, toy_data, generator=generator)


@pytest.mark.parametrize("name", FILTERS)
def test_every_name_makes_a_filter(name):
    made = make_filter(name)
    assert made == make_filter(name)
    assert (made.title, made.source_paper) != ("", "")


def test_names_and_rates():
    with pytest.raises(UnknownNameError, match=r"unknown detector 'stripe'.*did you mean strip"):
        make_filter("stripe")
    assert make_filter("strip", false_rejection=0.1) == STRIP(false_rejection=0.1)
    assert make_filter("spectral") == SpectralSignatures.paper()
    with pytest.raises(ConfigurationError, match="spectral sets no threshold on clean images"):
        make_filter("spectral", false_rejection=0.1)
    with pytest.raises(ConfigurationError, match="false_rejection must lie in"):
        make_filter("strip", false_rejection=1.0)


def test_a_network_without_a_last_layer_is_refused(generator):
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return 9 * self.scale * x.mean((2, 3))

    labels = torch.arange(60) % 3
    images = torch.rand(60, 3, 4, 4, generator=generator) * 0.5
    images[torch.arange(60), labels] += 0.5
    model = Classifier(Free(), num_classes=3)
    with pytest.raises(ModelError, match="no linear or convolutional layer"):
        SpectralSignatures()(model, ImageSet(images, labels), generator=generator)
