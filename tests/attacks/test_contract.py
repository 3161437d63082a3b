"""What every attack must do, run on each of them in a tiny form."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import cache

import pytest
import torch
from tiny import images, surrogate, tiny

from planted import NAMES, TARGET, stripes
from reprune.attacks import (
    ATTACKS,
    Backdoored,
    BadNets,
    Blend,
    Goal,
    PoisoningAttack,
    Setup,
    find_attack,
    make_attack,
    poison,
    read_trigger,
    trigger_name,
    triggered,
    write_trigger,
)
from reprune.checkpoints import Checkpoints
from reprune.data import ImageSet
from reprune.errors import ConfigurationError, DataError, RepruneError, UnknownNameError
from reprune.training import Training

EVERY = pytest.mark.parametrize("name", ATTACKS)
TARGETED = pytest.mark.parametrize(
    "name", [name for name, attack in ATTACKS.items() if "target" in attack.__dataclass_fields__]
)
POISONING = pytest.mark.parametrize(
    "name", [name for name, attack in ATTACKS.items() if issubclass(attack, PoisoningAttack)]
)
TRAINING = Training(epochs=1, batch_size=50, lr=0.02)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setup(seed: int = 0, **changes: object) -> Setup:
    return dataclasses.replace(
        Setup(generator=seeded(seed), training=TRAINING, surrogate=surrogate()), **changes
    )


@cache
def result(name: str) -> Backdoored:
    """One run of the tiny attack, shared by the tests. Do not change it."""
    return tiny(name)(surrogate(), images(), setup())


@cache
def poisoned(name: str):
    return poison(images(), tiny(name), seeded(), surrogate=surrogate())


def equal(first, second) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def rows_to_poison(name: str) -> int:
    return round(tiny(name).rate * len(images()))


@EVERY
def test_a_frozen_dataclass_of_keywords_with_a_name_and_a_source(name):
    attack = ATTACKS[name]
    assert dataclasses.is_dataclass(attack)
    assert attack.title
    assert attack.source_paper
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny(name).target = 1
    with pytest.raises(TypeError):
        attack(1)


@EVERY
def test_the_caller_keeps_model_surrogate_and_images(name, unchanged):
    data = images()
    before = data.images.clone(), data.labels.clone()
    stream = torch.get_rng_state()
    with unchanged(surrogate()):
        made = tiny(name)(surrogate(), data, setup())
    assert torch.equal(data.images, before[0])
    assert torch.equal(data.labels, before[1])
    assert torch.equal(torch.get_rng_state(), stream)
    assert made.model is not surrogate()
    assert not made.model.training
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


@EVERY
def test_seeds_reproduce(name):
    again = tiny(name)(surrogate(), images(), setup())
    assert equal(again.model, result(name).model)
    if again.trigger is not None:
        pixels = images().pixels(slice(0, 8))
        assert torch.equal(again.trigger(pixels), result(name).trigger(pixels))


@EVERY
def test_a_killed_run_ends_the_same(name, tmp_path):
    class Killed(Exception):
        pass

    steps: list[str] = []

    def count(phase, done, total, **figures):
        steps.append(phase)

    def checkpoints():
        return Checkpoints(tmp_path / "checkpoints", {}, every=0)

    def kill(phase, done, total, **figures):
        steps.append(phase)
        if len(steps) == stop:
            raise Killed

    tiny(name)(surrogate(), images(), setup(progress=count))
    whole = len(steps)
    for share in (0.3, 0.6, 0.99):  # of the steps, whatever phase that is; then of those left
        steps.clear()
        stop = max(1, int(share * whole))
        with contextlib.suppress(Killed):
            tiny(name)(surrogate(), images(), setup(progress=kill, checkpoints=checkpoints()))
    made = tiny(name)(surrogate(), images(), setup(checkpoints=checkpoints()))
    assert equal(made.model, result(name).model)
    if made.trigger is not None:
        pixels = images().pixels(slice(0, 4))
        assert torch.equal(made.trigger(pixels), result(name).trigger(pixels))


@TARGETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_triggers_keep_shape_range_and_dtype(name, dtype):
    trigger = result(name).trigger
    pixels = images().pixels(slice(0, 6))
    before = pixels.clone()
    changed = trigger(pixels)
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.float32
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert not torch.equal(changed, pixels)
    assert torch.equal(pixels, before)
    assert not changed.requires_grad
    data = images() if dtype == torch.uint8 else ImageSet(images().pixels(), images().labels)
    assert triggered(data, trigger, TARGET).images.dtype == dtype


@TARGETED
def test_triggers_are_pure_and_do_not_mix_images(name):
    trigger = result(name).trigger
    pixels = images().pixels(slice(0, 6))
    together = trigger(pixels)
    assert torch.equal(together, trigger(pixels))
    alone = torch.cat([trigger(pixel[None]) for pixel in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@TARGETED
def test_learned_triggers_reload_to_the_same_pixels(name, tmp_path):
    trigger = result(name).trigger
    path = tmp_path / trigger_name(trigger)
    write_trigger(trigger, path)
    pixels = images().pixels(slice(0, 6))
    assert torch.equal(read_trigger(path)(pixels), trigger(pixels))


@TARGETED
def test_triggered_leaves_out_images_that_show_nothing(name):
    attack, data = tiny(name), images()
    made = triggered(data, result(name).trigger, attack.goal)
    source = attack.goal.source
    kept = data.labels != TARGET if source is None else data.labels == source
    assert torch.equal(made.labels, data.labels[kept])
    assert TARGET not in made.labels


@POISONING
def test_the_stated_rate_exactly(name):
    made = poisoned(name)
    assert int(made.poisoned.sum()) == rows_to_poison(name)
    others = ~made.poisoned if made.covered is None else ~(made.poisoned | made.covered)
    assert torch.equal(made.data.images[others], images().images[others])
    assert torch.equal(made.data.labels[others], images().labels[others])
    assert made.data.images.dtype == torch.uint8
    assert made.data.class_names == NAMES


@POISONING
def test_labels_follow_the_goal_or_stay(name):
    attack, made = tiny(name), poisoned(name)
    if attack.clean_label:
        assert torch.equal(made.data.labels, images().labels)
        assert (images().labels[made.poisoned] == TARGET).all()
    else:
        wanted = attack.goal.wanted(images().labels, len(NAMES))
        assert torch.equal(made.data.labels[made.poisoned], wanted[made.poisoned])
        assert torch.equal(made.data.labels[~made.poisoned], images().labels[~made.poisoned])


@POISONING
def test_poisoned_images_differ_and_other_seeds_choose_other_rows(name):
    made = poisoned(name)
    rows = made.poisoned
    assert (made.data.images[rows] != images().images[rows]).flatten(1).any(1).all()
    other = poison(images(), tiny(name), seeded(1), surrogate=surrogate())
    assert not torch.equal(other.poisoned, rows)


@pytest.mark.parametrize(
    "name",
    [name for name, attack in ATTACKS.items() if "all_to_all" in attack.__dataclass_fields__],
)
def test_all_to_all_maps_every_class(name):
    attack = tiny(name, all_to_all=True, rate=0.5)
    made = poison(images(), attack, seeded(), surrogate=surrogate())
    rows = made.poisoned
    before, after = images().labels[rows], made.data.labels[rows]
    assert torch.equal(after, (before + 1) % 4)
    assert set(before.tolist()) == set(range(4))
    kept = triggered(images(), made.trigger, attack.goal)
    assert torch.equal(kept.labels, images().labels)


@TARGETED
@pytest.mark.parametrize("target", [-1, 4])
def test_targets_outside_the_classes(name, target):
    with pytest.raises(ConfigurationError, match=rf"class index in 0\.\.3, got {target}"):
        tiny(name, target=target)(surrogate(), images(), setup())


@TARGETED
@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_rates_outside_0_1(name, rate):
    with pytest.raises(ConfigurationError, match=r"rate must lie in \(0, 1\], got"):
        tiny(name, rate=rate)(surrogate(), images(), setup())


@TARGETED
def test_a_rate_that_poisons_nothing(name):
    with pytest.raises(ConfigurationError, match=r"poisons none of 200"):
        tiny(name, rate=0.001)(surrogate(), images(), setup())


@pytest.mark.parametrize("name", [name for name, a in ATTACKS.items() if a.clean_label])
def test_a_rate_that_asks_for_more_images_than_the_class_has(name):
    with pytest.raises(ConfigurationError, match=r"asks for 60 of 200 images, but .* there are 50"):
        poison(images(), tiny(name, rate=0.3), seeded(), surrogate=surrogate())


@pytest.mark.parametrize("name", [name for name, a in ATTACKS.items() if a.needs_surrogate])
def test_no_surrogate_where_one_is_needed(name):
    with pytest.raises(ConfigurationError, match="give one as surrogate"):
        tiny(name)(surrogate(), images(), setup(surrogate=None))


@EVERY
def test_labels_outside_the_classes(name):
    wrong = ImageSet(images().images, images().labels + 1)
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.3, got 1 to 4"):
        tiny(name)(surrogate(), wrong, setup())


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownNameError, match=r"did you mean 'badnets'\?\); known are badnets, "):
        find_attack("badnet")
    assert isinstance(UnknownNameError("x"), RepruneError)


def test_parameters_as_text():
    made = make_attack("cl", eps="8/255", steps="7", test_amplitude="none")
    assert (made.eps, made.steps, made.test_amplitude) == (8 / 255, 7, None)
    wrapped = make_attack("adv-t", base="blend", **{"base.alpha": "0.3"}, rate="0.2")
    assert wrapped.inner == Blend(alpha=0.3, rate=0.2)
    assert make_attack("adapt-d", **{"base.size": "5"}).inner == BadNets(size=5)
    for parameters in ({"eps": "1/0"}, {"eps": "a/b"}):
        with pytest.raises(ConfigurationError, match=r"cl: eps = '.*': Input should be a valid"):
            make_attack("cl", **parameters)
    with pytest.raises(ConfigurationError, match=r"badnets has no parameter colour; it has"):
        make_attack("adv-t", **{"base.colour": "red"})


def test_goals():
    labels = torch.tensor([0, 1, 2, 3])
    assert Goal(2).victims(labels).tolist() == [True, True, False, True]
    assert Goal(2).wanted(labels, 4).tolist() == [2, 2, 2, 2]
    assert Goal(None).victims(labels).all()
    assert Goal(None).wanted(labels, 4).tolist() == [1, 2, 3, 0]
    assert Goal(0, source=1).victims(labels).tolist() == [False, True, False, False]
    with pytest.raises(ConfigurationError, match=r"a source class in 0\.\.3, got 4"):
        Goal(0, source=4).check(4)
    with pytest.raises(ConfigurationError, match="the same class 1"):
        Goal(1, source=1).check(4)


def test_stripes_are_what_the_tests_count_on():
    assert torch.bincount(stripes(200, seed=0).labels).tolist() == [50] * 4
