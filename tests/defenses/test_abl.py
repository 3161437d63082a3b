"""Anti-Backdoor Learning on planted poisoned images."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import planted
from reprune.attacks import Poisoned, poison
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.abl import ABL
from reprune.detection.abl_isolation import ABLIsolation, local_gradient_ascent, reinitialised
from reprune.errors import ConfigurationError, DataError, DivergenceError, ModelError
from reprune.evaluation import evaluate
from reprune.rnp import FineTuning

SHORT = ABLIsolation(epochs=2, share=0.05)
QUICK = ABL(
    isolation=SHORT,
    tuning=FineTuning(lr=0.1, epochs=1),
    unlearning=FineTuning(epochs=1),
    padding=1,
)


@cache
def poisoned() -> Poisoned:
    return poison(planted.stripes(600, seed=10), planted.ATTACK, torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_local_gradient_ascent_turns_the_sign_below_gamma():
    """Losses of log 2 and log 5 around gamma = 1, in closed form, with their gradients."""
    shares = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    logits = shares.log().requires_grad_(True)
    value = local_gradient_ascent(1.0)(logits, torch.tensor([0, 0]))
    assert value.item() == pytest.approx((-math.log(2) + math.log(5)) / 2)
    value.backward()
    expected = torch.stack(
        [-(shares[0] - torch.tensor([1.0, 0])), shares[1] - torch.tensor([1.0, 0])]
    )
    assert torch.allclose(logits.grad, expected / 2)


def test_without_gamma_it_is_the_cross_entropy():
    logits, labels = torch.randn(5, 3, generator=seeded()), torch.tensor([0, 1, 2, 0, 1])
    expected = nn.functional.cross_entropy(logits, labels)
    assert local_gradient_ascent(0.0)(logits, labels).item() == pytest.approx(expected.item())


def test_the_images_of_lowest_loss_are_isolated(unchanged):
    model, rows = planted.model(backdoored=True), poisoned().poisoned
    with unchanged(model):
        found = ABLIsolation(share=0.05)(model, poisoned().data, generator=seeded())
    assert int(found.flagged.sum()) == 30
    assert rows.float().mean() == pytest.approx(0.1)
    assert found.scores[found.flagged].min() >= found.scores[~found.flagged].max()
    assert found.threshold is None
    assert "the 30 images of lowest loss (5.00%)" in found.reasons[0]
    assert len(found.trace.phases["isolate"]) == 20


def test_more_of_the_isolated_images_are_poisoned_than_of_the_others():
    """Over three orders: how many, rounding decides, for clean stripes are as easy to learn."""
    model, rows = planted.model(backdoored=True), poisoned().poisoned
    shares = [
        rows[ABLIsolation(share=0.05)(model, poisoned().data, generator=seeded(i)).flagged]
        for i in range(3)
    ]
    assert torch.cat(shares).float().mean() > 2.5 * rows.float().mean()


def test_the_final_model_has_no_backdoor(monkeypatch):
    """Where a third of the poisoned images is isolated: which ones are, rounding decides here."""
    isolate = ABL.isolate
    right = poisoned().poisoned.nonzero().flatten()[:20]
    monkeypatch.setattr(ABL, "isolate", lambda *a, **k: replace(isolate(*a, **k), index=right))
    defense = replace(
        QUICK,
        tuning=FineTuning(lr=0.1, epochs=40),
        unlearning=FineTuning(lr=0.01, epochs=10),
        padding=0,
        mirror=False,
    )
    result = defense(planted.model(backdoored=True), poisoned().data, generator=seeded())
    test = planted.stripes(400, seed=77)
    models = (result.stages["trained"], result.model)
    before, after = (
        evaluate(one, test, trigger=planted.trigger(), target=planted.TARGET) for one in models
    )
    assert before.asr.share > 0.9
    assert after.asr.share < 0.25
    assert after.ca.share > 0.95
    assert list(result.trace.phases) == ["isolate", "train", "erase"]
    assert result.trace.notes[0].startswith("20 of the 20 isolated images have the label 2;")


def test_the_generator_fixes_every_bit_and_progress_is_told(unchanged):
    model, told, states = planted.model(backdoored=True), [], []
    for noise in (1, 2):
        torch.manual_seed(noise)
        told.clear()
        before = torch.get_rng_state()
        with unchanged(model):
            result = QUICK(
                model,
                poisoned().data,
                generator=seeded(),
                progress=lambda *call, **_: told.append(call),
            )
        assert torch.equal(torch.get_rng_state(), before)
        states.append(result.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for phase in result.trace.phases:
        steps = [(done, total) for name, done, total in told if name == phase]
        assert steps == [(k + 1, len(steps)) for k in range(len(steps))]
    own = {value.data_ptr() for value in model.parameters()}
    for one in (result.model, *result.stages.values()):
        assert own.isdisjoint(value.data_ptr() for value in one.parameters())
        assert not one.training


@pytest.mark.parametrize("method", [QUICK, SHORT])
def test_the_cost_is_what_it_says_at_most(method):
    seen, data = [], poisoned().data

    class Counting(nn.Identity):
        def forward(self, images):
            seen.append(len(images))
            return images

    network = nn.Sequential(Counting(), planted.model(backdoored=True).clone().network)
    model = Classifier(network, (0.5,), (0.25,), num_classes=4)
    method(model, data, generator=seeded())
    said = method.passes(len(data), 4)
    assert said / 5 <= sum(seen) / len(data) <= said + 0.2


def test_fresh_weights_owe_nothing_to_the_old_ones(unchanged):
    model = planted.model(backdoored=True)
    with unchanged(model):
        first, again = (reinitialised(model, seeded()) for _ in range(2))
    other = reinitialised(model, seeded(1))
    for name, value in first.network.named_parameters():
        assert torch.equal(value, dict(again.network.named_parameters())[name])
    weights = [m.network[0].weight for m in (model, first, other)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert (first.network[1].running_mean == 0).all()


class Prompted(nn.Module):
    """A parameter of its own that nothing initialises, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)


def test_a_parameter_that_nothing_initialises_is_named():
    model = Classifier(Prompted(), num_classes=4)
    message = r"no module's reset_parameters sets network.token; pass .* reinitialise=False"
    with pytest.raises(ModelError, match=message):
        ABL().isolate(model, planted.stripes(80, seed=1), generator=seeded())


def test_without_new_weights_training_starts_from_those_of_the_model():
    model = planted.model(backdoored=False)
    still = ABLIsolation(epochs=1, lr=1e-12, weight_decay=0.0, gamma=0.0, reinitialise=False)
    found = still.isolate(model, planted.stripes(80, seed=1), generator=seeded())
    assert torch.allclose(found.model.network[0].weight, model.network[0].weight)


def test_as_a_filter_it_takes_an_untrained_model_but_no_broken_one():
    model, data = planted.model(backdoored=False).clone(), planted.stripes(80, seed=1)
    with torch.no_grad():
        model.network[-1].weight.zero_()  # every image gets one class
    found = ABLIsolation(epochs=1, reinitialise=False)(model, data, generator=seeded())
    assert int(found.flagged.sum()) == 1
    with torch.no_grad():
        model.network[-1].bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinite on 80 of 80 images"):
        ABLIsolation(epochs=1, reinitialise=False)(model, data, generator=seeded())


def test_labels_that_the_model_does_not_have_are_refused():
    data = planted.stripes(80, seed=1)
    with pytest.raises(DataError, match="but the data has the labels 4, 5, 6, 7;"):
        ABL()(planted.model(True), ImageSet(data.images, data.labels + 4), generator=seeded())


@pytest.mark.parametrize(
    "method",
    [
        ABL(isolation=ABLIsolation(lr=1e30)),
        ABL(isolation=SHORT, tuning=FineTuning(lr=1e30, epochs=1)),
        ABL(isolation=SHORT, tuning=None, unlearning=FineTuning(lr=1e30, epochs=1)),
    ],
)
def test_divergence_is_told_with_its_phase(method):
    with pytest.raises(DivergenceError, match=r"(isolate|train|erase) diverged in epoch 1: the"):
        method(planted.model(True), poisoned().data, generator=seeded())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ABLIsolation(epochs=0), "epochs must be at least 1 and batch_size 2, got 0 and 64"),
        (ABLIsolation(gamma=-1.0), "gamma must not be negative, got -1.0"),
        (ABLIsolation(share=1.0), r"share must lie in \(0, 1\), got 1.0"),
        (ABLIsolation(lr=0.0), "lr must be positive, got 0.0"),
        (ABL(ascent=0.0), "ascent must be positive or None, got 0.0"),
        (ABL(loss_cap=0.5), "loss_cap counts in losses of a random guess"),
        (ABL(padding=-1), "padding must not be negative, got -1"),
        (ABL(tuning=FineTuning(lr=0)), "lr, epochs and batch_size must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(method, message):
    with pytest.raises(ConfigurationError, match=message):
        method(planted.model(True), poisoned().data, generator=seeded())


def test_the_papers_settings():
    paper = ABL.paper()
    paper.check()
    assert (paper.isolation.epochs, paper.isolation.gamma, paper.isolation.share) == (20, 0.5, 0.01)
    assert paper.isolation.epochs + paper.tuning.epochs + paper.unlearning.epochs == 100
    assert (paper.unlearning.lr, paper.ascent, paper.loss_cap) == (5e-4, 1.0, None)
