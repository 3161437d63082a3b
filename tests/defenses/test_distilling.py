"""Distilling triggers out of a model, and stepping back."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.attacks import Stamp
from reprune.attacks.stamping import StampingAttack
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import Deadline
from reprune.defenses import distilling
from reprune.defenses.distilling import (
    Distilling,
    Lesson,
    _attraction,
    _no_likelier,
    distil,
    interpolated,
)
from reprune.errors import ConfigurationError, DivergenceError
from reprune.evaluation import evaluate, predict
from reprune.training import one_cycle

CLEAN = planted.stripes(200, seed=3)
TEST = planted.stripes(400, seed=9)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_known_trigger_goes_and_the_accuracy_stays() -> None:
    model, trigger = planted.model(True), planted.ATTACK.trigger(CLEAN.shape)
    settings = Distilling(steps=160, lr=0.1)
    copy, history = distil(model, [Lesson(trigger)], CLEAN, settings, generator=generator())
    before, after = (
        evaluate(one, TEST, trigger=trigger, target=planted.TARGET) for one in (model, copy)
    )
    assert before.asr.share > 0.95
    assert after.asr.share < 0.1
    assert after.ca.share > before.ca.share - 0.05
    assert len(history) == settings.epochs(len(CLEAN)) == 40
    assert history[-1].loss < history[0].loss


def test_lessons_end_in_time_at_a_rate_that_has_fallen(monkeypatch) -> None:
    rates, seconds = [], 0.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)

    def recorded(step: int, total: int) -> float:
        rates.append(one_cycle(step, total))
        return rates[-1]

    monkeypatch.setattr(distilling, "one_cycle", recorded)

    def tick(*_: object, **__: float) -> None:
        nonlocal seconds
        seconds += 10

    trigger = Lesson(planted.ATTACK.trigger(CLEAN.shape))
    settings, deadline = Distilling(steps=160, batch_size=50), Deadline(125.0, spent=25.0)
    _, history = distil(
        planted.model(True),
        [trigger],
        CLEAN,
        settings,
        generator=generator(),
        progress=tick,
        deadline=deadline,
    )
    assert (len(rates), len(history)) == (10 + 1, 3)
    assert max(rates) == pytest.approx(1.0, abs=0.2)
    assert rates[-1] == one_cycle(159, 160)


def test_a_lesson_exaggerates_up_to_its_strength() -> None:
    images = torch.full((50, 1, 2, 2), 0.5)
    lesson = Lesson(Stamp(torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.1)), strongest=3.0)
    change = lesson(images, generator()) - images
    assert 0.1 <= float(change.min()) < 0.15
    assert 0.25 < float(change.max()) <= 0.3 + 1e-6
    assert torch.allclose(lesson.apply(images, 2.0), images + 0.2)
    assert float(lesson.apply(images, 30.0).max()) == 1.0


def test_interpolation_ends_at_both_models() -> None:
    first, second = planted.model(True), planted.model(False)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    for share, end in ((0.0, first), (1.0, second)):
        between = interpolated(first, second, share)
        assert torch.allclose(predict(between, CLEAN), predict(end, CLEAN), atol=1e-3)
    assert all(torch.equal(before[k], v) for k, v in first.state_dict().items())


def test_tied_weights_are_interpolated_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.two.weight, self.alias = self.one.weight, self.one

    first = Classifier(Tied(), num_classes=2)
    second = first.clone()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    between = interpolated(first, second, 0.125).network
    for name in ("weight", "bias"):
        moved = getattr(between.one, name) - getattr(first.network.one, name)
        assert torch.allclose(moved, torch.tensor(0.125), atol=1e-6)


def test_masks_and_extra_state_stay_as_they_are() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.end = nn.Linear(4, 2)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

        def get_extra_state(self) -> str:
            return "something"

        def set_extra_state(self, state: str) -> None: ...

    first = Classifier(Masked(), num_classes=2)
    second = first.clone()
    with torch.no_grad():
        second.network.end.weight.add_(1.0)
    for share in (0.125, 0.5, 1.0):
        between = interpolated(first, second, share).network
        assert torch.equal(between.mask, first.network.mask)
        moved = between.end.weight - first.network.end.weight
        assert torch.allclose(moved, torch.tensor(share), atol=1e-6)


def test_only_the_last_layers_learn_and_all_may_learn_afterwards() -> None:
    model, trigger = planted.model(True), planted.ATTACK.trigger(CLEAN.shape)
    settings = Distilling(steps=4, depth=0.5)
    copy, _ = distil(model, [Lesson(trigger)], CLEAN, settings, generator=generator())
    before = dict(model.named_parameters())
    moved = {n for n, p in copy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"network.6.weight", "network.11.weight"}
    assert all(p.requires_grad for p in copy.parameters())


class Bare(nn.Module):
    """Its weights belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(4, 3 * planted.SIDE**2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_where_no_layer_is_known_all_weights_learn() -> None:
    model = Classifier(Bare(), num_classes=4)
    trigger = planted.ATTACK.trigger(CLEAN.shape)
    copy, _ = distil(model, [Lesson(trigger)], CLEAN, Distilling(steps=4), generator=generator())
    assert not torch.equal(copy.network.weight, model.network.weight)


def test_with_mixtures_the_copy_stays_closer_to_the_model_between_images() -> None:
    model, trigger = planted.model(True), planted.ATTACK.trigger(CLEAN.shape)
    half = (TEST.pixels() + TEST.pixels().roll(1, 0)) / 2
    apart = []
    for mixed in (0.0, 3.0):
        settings = Distilling(steps=60, lr=0.1, depth=1.0, mixed=mixed)
        copy, _ = distil(model, [Lesson(trigger)], CLEAN, settings, generator=generator())
        with torch.no_grad():
            apart.append(float((copy(half).softmax(1) - model(half).softmax(1)).abs().mean()))
    assert apart[1] < 0.9 * apart[0]
    assert Distilling(mixed=1.0).passes(400) > Distilling(mixed=0.0).passes(400)


def test_what_is_repelled_leads_to_its_class_least_of_all() -> None:
    """The lesson is half as strong as the attacker's trigger, which goes too, and further."""
    model, trigger = planted.model(True), planted.ATTACK.trigger(CLEAN.shape)

    def weak(images: Tensor) -> Tensor:
        return images + 0.5 * (trigger(images) - images)

    lesson = Lesson(weak, label=planted.TARGET)
    others = TEST.subset((TEST.labels != planted.TARGET).nonzero().flatten().tolist())
    left = []
    for repelled in (0.0, 0.5):
        settings = Distilling(steps=60, lr=0.1, repelled=repelled)
        copy, _ = distil(model, [lesson], CLEAN, settings, generator=generator())
        measured = evaluate(copy, TEST, trigger=trigger, target=planted.TARGET)
        with torch.no_grad():
            answers = copy(trigger(others.pixels())).log_softmax(1)
        left.append(float(answers[:, planted.TARGET].mean()))
        assert measured.ca.share > 0.93
        assert measured.asr.share < 0.1
    assert left[1] < left[0] - 1


def test_how_much_triggered_images_lead_to_a_class() -> None:
    log = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]]).log()
    taught = torch.tensor(
        [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]]
    ).log()
    labels = torch.tensor([0, 0, -1, 0])
    # the first is of class 0 itself, the third has no label, the last is below the least
    wanted = (log[1, 0] - taught[1].min()).relu() / 4
    assert torch.isclose(_attraction(log, taught, labels), wanted)
    towards = (log[[0, 1, 3], 1] - taught[[0, 1, 3]].amin(1)).relu().sum() / 4
    assert torch.isclose(_attraction(log, taught, torch.tensor([1, 1, 1, 1])), towards)


def test_where_no_class_is_known_nothing_is_repelled() -> None:
    model, trigger = planted.model(True), planted.ATTACK.trigger(CLEAN.shape)
    plain, repelled = (
        distil(model, [Lesson(trigger)], CLEAN, settings, generator=generator())[0]
        for settings in (Distilling(steps=4, repelled=0.0), Distilling(steps=4, repelled=1.0))
    )
    weights = plain.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in repelled.state_dict().items())


def test_what_cannot_work_is_refused() -> None:
    model, trigger = planted.model(True), planted.ATTACK.trigger(CLEAN.shape)
    with pytest.raises(ConfigurationError, match="no trigger"):
        distil(model, [], CLEAN, Distilling(), generator=generator())
    with pytest.raises(ConfigurationError, match="mixed must not be negative"):
        Distilling(mixed=-1.0).check()
    with pytest.raises(ConfigurationError, match="repelled must not be negative"):
        Distilling(repelled=-1.0).check()
    with pytest.raises(ConfigurationError, match="lr must be positive"):
        replace(Distilling(), lr=0.0).check()
    with pytest.raises(ConfigurationError, match=r"depth must lie in \(0, 1\]"):
        replace(Distilling(), depth=0.0).check()
    wild = Distilling(lr=1e30)
    with pytest.raises(DivergenceError, match="distil diverged"):
        distil(model, [Lesson(trigger)], CLEAN, wild, generator=generator())


def test_mixtures_make_a_suspected_class_no_likelier_than_their_images_do() -> None:
    first, second, both = torch.randn(3, 50, 4, generator=generator()).mul(3).unbind()
    likely = _no_likelier(both, first, second, [1, 3]).exp()
    plain, *images = (answers.softmax(1) for answers in (both, first, second))
    most = torch.maximum(*images)
    assert torch.allclose(likely[:, [0, 2]], plain[:, [0, 2]], atol=1e-6)
    assert torch.allclose(likely[:, [1, 3]], torch.minimum(plain, most)[:, [1, 3]], atol=1e-6)
    assert (likely < plain - 0.01).any()
    assert torch.allclose(_no_likelier(both, first, second, []).exp(), plain, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Pale(StampingAttack):
    """Pictures of half the contrast, as those are that are mixed of two."""

    title: ClassVar[str] = "pale"
    source_paper: ClassVar[str] = "this test"

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        return Stamp(torch.full(shape, 0.5), torch.full(shape, 0.25))


def test_mixtures_that_look_triggered_are_not_taught(monkeypatch) -> None:
    """Nor that they lead to the class that lessons are of, where none of their images is of it."""
    model = planted.model(True, Pale(target=planted.TARGET, rate=0.2))
    trigger = planted.ATTACK.trigger(CLEAN.shape)
    others = TEST.subset((TEST.labels != planted.TARGET).nonzero().flatten().tolist())
    pixels, settings = others.pixels(), Distilling(steps=100, lr=0.1)

    def led(model: Classifier) -> float:
        mixtures = ImageSet((pixels + pixels.roll(1, 0)) / 2, others.labels)
        return float((predict(model, mixtures).argmax(1) == planted.TARGET).float().mean())

    left = []
    for rule in (_no_likelier, lambda answers, *_: answers):
        monkeypatch.setattr("reprune.defenses.distilling._no_likelier", rule)
        lesson = Lesson(trigger, label=planted.TARGET)
        copy, _ = distil(model, [lesson], CLEAN, settings, generator=generator())
        left.append(led(copy))
    assert left[0] < 0.15
    assert min(left[1], led(model)) > 0.3


def test_of_large_images_the_copy_takes_a_few_at_once() -> None:
    layers = [nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(4, 3))
    taught: list[int] = []
    ended: list[int] = []
    network.register_forward_pre_hook(
        lambda _, given: taught.append(len(given[0])) if torch.is_grad_enabled() else None
    )
    network.register_forward_hook(
        lambda _, given, __: ended.append(len(given[0])) if torch.is_grad_enabled() else None
    )
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3, num_classes=3)
    images = torch.rand(8, 3, 128, 128, generator=generator())
    data = ImageSet(images, torch.arange(8) % 3)
    trigger = Stamp(torch.zeros(3, 128, 128), torch.zeros(3, 128, 128))
    settings = Distilling(steps=1, batch_size=8)
    distil(model, [Lesson(trigger, label=0)], data, settings, generator=generator())
    assert taught == ended == [6] * 8  # 24 images, forward and again backward
