"""Repair by a recovered trigger, on a model with a planted backdoor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import planted
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.defense import Purified
from reprune.defenses.erasing import erasing
from reprune.defenses.suspect import most_anomalous
from reprune.defenses.trigger_repair import TriggerRepair, _patching
from reprune.detection import Inversion, Inverted
from reprune.errors import ConfigurationError, DivergenceError
from reprune.evaluation import evaluate
from reprune.results import Evaluation
from reprune.rnp import FineTuning, Unlearning, tune
from reprune.training import Batch
from reprune.types import silent

TUNING = FineTuning(epochs=8, batch_size=32)


@pytest.fixture(scope="module")
def clean() -> ImageSet:
    return planted.stripes(200, seed=55)


def run(defense: TriggerRepair, model: Classifier, clean: ImageSet, seed: int = 0) -> Purified:
    return defense(model, clean, generator=torch.Generator().manual_seed(seed))


def judged(model: Classifier) -> Evaluation:
    test = planted.stripes(400, seed=77)
    return evaluate(model, test, trigger=planted.trigger(), target=planted.TARGET)


def linear(classes: int = 3) -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3, classes)), num_classes=classes)


def batch(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    rows = torch.arange(len(labels))
    return Batch(images, labels, rows, 0, 0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by", ["finetune", "unlearn"])
def test_the_backdoor_goes_and_accuracy_stays(by, clean):
    result = run(TriggerRepair(by=by, tuning=TUNING), planted.model(True), clean)
    outcome = judged(result.model)
    assert judged(planted.model(True)).asr.share > 0.95
    assert outcome.asr.share < 0.05
    assert outcome.ca.share > 0.95
    assert list(result.triggers) == [planted.TARGET]
    assert result.trace.notes[-1].startswith("the recovered trigger sends 9")
    assert not result.mask


def test_a_trigger_of_the_unlearned_model_that_fails_is_replaced(clean):
    """The tiny unlearned model falls back to a class that is not the attacker's."""
    defense = TriggerRepair(tuning=TUNING, unlearning=Unlearning())
    result = run(defense, planted.model(True), clean)
    assert result.trace.label.label not in (None, planted.TARGET)
    assert "sends only" in result.trace.notes[1]
    assert result.trace.notes[2] == "the trigger is recovered on the original model instead"
    assert list(result.triggers) == [planted.TARGET]
    assert judged(result.model).asr.share < 0.05
    assert list(result.stages) == ["unlearned"]
    assert list(result.trace.phases) == ["unlearn", "fine-tune"]


@pytest.mark.parametrize(
    ("defense", "note"),
    [
        (TriggerRepair(inversion=Inversion(steps=1)), "no trigger was recovered for any of 4"),
        (TriggerRepair(index=100.0), "no class stands out: class 2 needs"),
    ],
)
def test_without_a_trigger_the_model_is_returned_unchanged_and_it_says_so(defense, note, clean):
    model = planted.model(True)
    result = run(defense, model, clean)
    assert note in result.trace.notes[0]
    assert result.trace.notes[-1] == "nothing was repaired: the model is returned unchanged"
    assert not result.triggers
    assert result.model is not model
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())


def test_a_repair_that_fails_says_so(clean):
    result = run(TriggerRepair(tuning=FineTuning(lr=1e-9, epochs=1)), planted.model(True), clean)
    assert "the repair failed: the recovered trigger still works" in result.trace.notes


def test_a_repair_that_costs_accuracy_says_so(clean):
    result = run(TriggerRepair(tuning=FineTuning(lr=3.0, epochs=2)), planted.model(True), clean)
    assert any(note.startswith("the repair cost accuracy: 100.0%") for note in result.trace.notes)


def test_the_smallest_trigger_is_themost_anomalous():
    blank = torch.zeros(3, 1, 2, 2)
    found = Inverted((4, 5, 6), blank, blank, (9.0, math.nan, 2.0), (1.0, 0.0, 1.0))
    assert most_anomalous(found, 16, 0.0)[0] == 2
    same = replace(found, sizes=(3.0, 3.0, 3.0))
    assert most_anomalous(same, 16, 0.0)[0] is None
    none = replace(found, sizes=(math.inf, math.nan, math.inf))
    assert most_anomalous(none, 16, 0.0)[0] is None


def test_erasing_descends_on_the_batch_and_ascends_up_to_the_cap():
    """Against the formula, with an image beyond the cap and one of weight 0."""
    model = linear()
    generator = torch.Generator().manual_seed(1)
    images, others = (torch.rand(4, 3, 1, 1, generator=generator) for _ in range(2))
    others[0] *= 100
    labels, lost = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 2])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    bound = erasing(lambda _: (others, lost, weights), 1.01, ascent=0.5)(model)
    value, right = bound(batch(images, labels))
    kept, gone = (model(x).detach().log_softmax(1) for x in (images, others))
    descent = -sum(kept[i, y] for i, y in enumerate(labels.tolist())) / 4
    each = [min(-float(gone[i, lost[i]]), 1.01 * math.log(3)) for i in (0, 1, 3)]
    assert value.item() == pytest.approx(float(descent) - 0.5 * sum(each) / 3, rel=1e-5)
    assert int(right) == int((kept.argmax(1) == labels).sum())


def test_patching_stamps_the_share_and_keeps_the_labels():
    seen = []
    model = linear()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(10) % 3
    value, _ = _patching(lambda x: torch.ones_like(x), 0.3)(model)(batch(images, labels))
    assert int((seen[0] == 1).all(1).sum()) == 3
    assert int((seen[0] == images).all(1).sum()) == 7
    assert torch.equal(value, nn.functional.cross_entropy(model(seen[0]), labels))


def test_weights_that_end_as_nan_are_a_divergence(clean):
    def objective(model):
        model.network[1].running_mean.fill_(torch.nan)

        def loss(one):
            return model(one.images).sum() * 0 + 1, torch.tensor(0)

        return loss

    model = planted.model(True)
    with pytest.raises(DivergenceError, match="tune diverged in epoch 1: the weights or running"):
        tune(
            model,
            clean,
            objective,
            FineTuning(epochs=1),
            phase="tune",
            augmentation=Augmentation(0, mirror=False),
            generator=torch.Generator(),
            progress=silent,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "prune"}, "by must be 'finetune' or 'unlearn', got 'prune'"),
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"share": math.nan}, r"share must lie in \(0, 1\], got nan"),
        ({"index": -1.0}, "index must not be negative, got -1.0"),
        ({"min_flip": 1.0}, r"min_flip must lie in \(0, 1\), got 1.0"),
        ({"loss_cap": 1.0}, "loss_cap counts in losses of a random guess"),
        ({"inversion": Inversion(steps=0)}, "steps of an inversion must be at least 1, got 0"),
        ({"inversion": Inversion(flip=1.5)}, r"flip of an inversion must lie in \(0, 1\]"),
        ({"tuning": FineTuning(epochs=0)}, "lr, epochs and batch_size must be positive"),
        (
            {"unlearning": Unlearning(level="filter")},
            "needs unlearning at the neuron level",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message, clean):
    with pytest.raises(ConfigurationError, match=message):
        run(TriggerRepair(**change), planted.model(True), clean)


def test_the_papers_settings():
    assert TriggerRepair.paper().share == 0.2
    assert TriggerRepair.paper().unlearning is None
    assert TriggerRepair.paper("unlearn").tuning.lr == 5e-4
    assert TriggerRepair.paper("unlearn", unlearned=True).unlearning.weight_decay == 5e-2
    for by in ("finetune", "unlearn"):
        TriggerRepair.paper(by, unlearned=True).check()
