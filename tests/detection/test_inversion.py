"""Trigger inversion on a model with a planted backdoor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection import Inversion, Inverted, invert
from reprune.detection.schedule import Schedule
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate

QUICK = Inversion(steps=5, images=8)


def run(
    model: Classifier,
    data: ImageSet,
    settings: Inversion = QUICK,
    *,
    classes: tuple[int, ...] = (0, 1, 2, 3),
    seed: int = 0,
    progress: Callable[..., None] = lambda *_, **__: None,
) -> Inverted:
    generator = torch.Generator().manual_seed(seed)
    return invert(model, data, classes, settings, generator=generator, progress=progress)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return planted.stripes(120, seed=55)


@pytest.fixture(scope="module")
def inverted(data: ImageSet) -> Inverted:
    return run(planted.model(backdoored=True), data, Inversion())


def test_the_planted_class_needs_the_smallest_trigger(inverted):
    assert inverted.classes == (0, 1, 2, 3)
    assert min(inverted.sizes) == inverted.sizes[planted.TARGET]
    assert inverted.sizes[planted.TARGET] < 0.5 * sorted(inverted.sizes)[1]
    assert inverted.sizes[planted.TARGET] <= 9  # the planted patch has 9 pixels


def test_only_a_trigger_that_was_found_has_a_place(inverted):
    assert inverted.place(planted.TARGET) == planted.TARGET
    assert inverted.place(None) is None
    assert inverted.place(9) is None
    never = replace(inverted, states=("never flips", "saturated", *inverted.states[2:]))
    assert [never.place(k) for k in (0, 1)] == [None, None]


def test_shapes_ranges_and_sizes(inverted):
    side = planted.SIDE
    assert inverted.masks.shape == (4, 1, side, side)
    assert inverted.patterns.shape == (4, 3, side, side)
    for values in (inverted.masks, inverted.patterns):
        assert not values.requires_grad
        assert values.min() >= 0
        assert values.max() <= 1
    assert torch.allclose(inverted.masks.flatten(1).sum(1), torch.tensor(inverted.sizes))


def test_the_recovered_trigger_works_on_other_images(inverted):
    trigger, target = inverted.trigger(planted.TARGET), planted.TARGET
    others = planted.stripes(200, seed=99)
    model = planted.model(backdoored=True)
    assert evaluate(model, others, trigger=trigger, target=target).asr.share > 0.7
    innocent = planted.model(backdoored=False)
    assert evaluate(innocent, others, trigger=trigger, target=target).asr.share < 0.5


def test_the_flip_rate_is_that_of_the_trigger_returned(inverted, data):
    model = planted.model(backdoored=True)
    for k in inverted.classes:
        rate = evaluate(model, data, trigger=inverted.trigger(k), target=k).asr
        assert inverted.flips[k] == pytest.approx(rate.share)
        assert rate.share > 0.7


def test_a_trigger_is_mask_and_pattern(inverted):
    images = torch.rand(2, 3, planted.SIDE, planted.SIDE)
    mask, pattern = inverted.masks[1], inverted.patterns[1]
    assert torch.allclose(
        inverted.trigger(1)(images), (1 - mask) * images + mask * pattern, atol=1e-6
    )


def test_classes_may_be_chosen_and_chunks_do_not_matter(data):
    model = planted.model(backdoored=True)
    assert run(model, data, classes=(3, 1)).classes == (3, 1)
    whole, parts = run(model, data), run(model, data, replace(QUICK, chunk=1))
    assert torch.allclose(whole.masks, parts.masks, atol=1e-5)


def test_the_generator_fixes_every_bit(data):
    model = planted.model(backdoored=True)
    torch.manual_seed(1)
    first = run(model, data)
    torch.manual_seed(2)
    again, other = run(model, data), run(model, data, seed=1)
    assert torch.equal(first.masks, again.masks)
    assert torch.equal(first.patterns, again.patterns)
    assert not torch.equal(first.patterns, other.patterns)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_untouched(data, unchanged, fails):
    model = copy.deepcopy(planted.model(backdoored=True)).train()
    model.network[1].eval()
    model.network[0].weight.requires_grad_(False)
    model.network[4].bias.requires_grad_(False)
    model.network[3].weight.grad = torch.ones_like(model.network[3].weight)

    def progress(*_: object, **__: float) -> None:
        if fails:
            raise KeyboardInterrupt

    with unchanged(model):
        if fails:
            with pytest.raises(KeyboardInterrupt):
                run(model, data, progress=progress)
        else:
            run(model, data, progress=progress)


@dataclass(eq=False)
class Answers(nn.Module):
    """Logits by a function of the pixels."""

    answer: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)


def test_without_a_trigger_the_size_is_infinite(data):
    def always_class_1(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None] * 0.01 + torch.tensor([0.0, 9.0, 0.0, 0.0])

    found = run(Classifier(Answers(always_class_1), num_classes=4), data, replace(QUICK, steps=20))
    assert [math.isinf(size) for size in found.sizes] == [True, False, True, True]
    assert found.states == ("never flips", "empty", "never flips", "never flips")
    assert found.flips == (0, found.flips[1], 0, 0)
    assert found.flips[1] == 1


def test_where_the_loss_goes_nan_the_size_is_nan(data):
    """Only for the class concerned: the others are solved as if nothing had happened."""

    def logits(x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ torch.eye(3, 4) * 50

    calls = 0

    def breaking(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        answer = logits(x).clone()
        if calls == 3:
            answer[2 * QUICK.images] = float("nan")  # an image of the third class
        return answer

    broken = run(Classifier(Answers(breaking), num_classes=4), data)
    sound = run(Classifier(Answers(logits), num_classes=4), data)
    assert math.isnan(broken.sizes[2])
    assert broken.states[2] == "broken"
    assert torch.equal(broken.masks[[0, 1, 3]], sound.masks[[0, 1, 3]])
    assert [broken.sizes[k] for k in (0, 1, 3)] == [sound.sizes[k] for k in (0, 1, 3)]


def test_progress_is_told_each_step(data):
    told: list[tuple[str, int, int]] = []
    run(planted.model(True), data, progress=lambda *step, **_: told.append(step))
    assert told == [("invert", step, 5) for step in range(1, 6)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps of an inversion must be at least 1, got 0"),
        ({"images": 0}, "images of an inversion must be at least 1, got 0"),
        ({"chunk": 0}, "chunk of an inversion must be at least 1, got 0"),
        ({"settle": 0}, "settle of an inversion must be at least 1, got 0"),
        ({"lr": -1.0}, "lr of an inversion must be positive, got -1.0"),
        ({"flip": 1.1}, r"flip of an inversion must lie in \(0, 1\], got 1.1"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"up": 0.5}, "up and down must be at least 1, got 0.5 and 1.15"),
        ({"start": "loud"}, "start must be 'faint' or 'random', got 'loud'"),
    ],
)
def test_settings_that_cannot_work(setting, message, data):
    with pytest.raises(ConfigurationError, match=message):
        run(planted.model(True), data, replace(QUICK, **setting))


def test_no_class(data):
    with pytest.raises(ConfigurationError, match="needs a class"):
        run(planted.model(True), data, classes=())


def test_a_class_that_needs_the_whole_picture_is_saturated():
    size = 0.95 * planted.SIDE**2
    masks = torch.full((1, 1, planted.SIDE, planted.SIDE), 0.95)
    found = Inverted((0,), masks, torch.rand(1, 3, planted.SIDE, planted.SIDE), (size,), (1.0,))
    assert found.states == ("saturated",)


def linear(x: Tensor) -> Tensor:
    return x.mean((2, 3)) @ torch.eye(3, 4) * 50


def test_classes_that_are_done_leave_the_batch_and_the_search_ends(data):
    seen: list[int] = []

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        return linear(x)

    settings = replace(QUICK, steps=400, settle=15)
    told: list[int] = []
    found = run(
        Classifier(Answers(counted), num_classes=4),
        data,
        settings,
        classes=(0, 1, 2),
        progress=lambda _, done, total: told.append(done),
    )
    assert found.states == ("found",) * 3
    assert told == list(range(1, len(told) + 1))
    assert told[-1] < settings.steps
    sizes = [count // settings.images for count in seen[: told[-1]]]
    assert sizes[0] == 3
    assert sizes == sorted(sizes, reverse=True)


def test_who_leaves_does_not_change_the_others(data):
    model = Classifier(Answers(linear), num_classes=4)
    settings = replace(QUICK, steps=120, settle=15)
    together = run(model, data, settings, classes=(0, 1, 2, 3))
    whole = run(model, data, replace(settings, chunk=8), classes=(0, 1, 2, 3))
    assert torch.allclose(together.masks, whole.masks, atol=1e-5)
    assert together.states == whole.states


def schedule(**rules: object) -> Schedule:
    plain = Inversion(smoothing=0.0, patience=2, up=2.0, down=4.0, cost=0.1, settle=None)
    return Schedule(replace(plain, **rules), 1, torch.device("cpu"))


def told(schedule: Schedule, hits: int, size: float = 1.0) -> float:
    part, use = torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool)
    schedule.count(part, torch.arange(4)[None] < hits, use, torch.zeros(1))
    schedule.check(torch.tensor([size]))
    return float(schedule.weight)


def test_the_weight_rises_and_falls_after_so_many_checks():
    weights = schedule()
    assert [told(weights, 4) for _ in range(4)] == pytest.approx([0.1, 0.2, 0.2, 0.4])
    assert [told(weights, 0) for _ in range(4)] == pytest.approx([0.4, 0.1, 0.1, 0.025])
    weights = schedule()
    assert [told(weights, hits) for hits in (4, 0, 4, 0)] == pytest.approx([0.1] * 4)


def test_a_delayed_weight_waits_for_the_flip_rate():
    weights = schedule(delay=True)
    assert [told(weights, hits) for hits in (0, 0, 4, 0, 4, 4)] == pytest.approx([0] * 5 + [0.1])
    assert [told(weights, 4) for _ in range(2)] == pytest.approx([0.1, 0.2])


def test_a_class_settles_once_its_weight_has_turned():
    weights = schedule(settle=2, patience=1)
    for hits, size, done in (
        (4, 9.0, False),
        (4, 8.99, False),  # not one per cent smaller
        (4, 9.5, False),  # idle, but the weight never fell
        (0, 1.0, True),
    ):
        told(weights, hits, size)
        assert bool(weights.done) == done
    told(weights, 4, 1.0)
    assert weights.sizes() == pytest.approx([8.99])  # what comes later does not count


def test_a_mask_that_does_not_flip_its_own_images_is_not_kept():
    """The smoothed rate still holds, the rate of the step does not."""
    schedule = Schedule(Inversion(), 1, torch.device("cpu"))
    part, use, loss = torch.tensor([0]), torch.ones(1, 20).bool(), torch.zeros(1)
    for size, hits in [*[(50.0, 20)] * 10, (20.0, 18)]:
        schedule.count(part, (torch.arange(20) < hits)[None], use, loss)
        better = schedule.check(torch.tensor([size]))
    assert not bool(better)
    assert schedule.sizes() == [50.0]
