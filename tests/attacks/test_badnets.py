from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprune.attacks import BadNets, poison, triggered
from reprune.data import ImageSet
from reprune.errors import ConfigurationError


def data(count: int = 40, dtype: torch.dtype = torch.uint8) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, 6, 6), generator=seeded()).byte()
    if dtype == torch.float32:
        images = images.float() / 255
    return ImageSet(images, torch.arange(count) % 4, ("a", "b", "c", "d"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.floats(0.01, 1),
    st.integers(0, 3),
    st.sampled_from([torch.uint8, torch.float32]),
)
def test_poison_hits_the_stated_rate_exactly(count, rate, target, dtype):
    clean = data(count, dtype)
    images, labels = clean.images.clone(), clean.labels.clone()
    attack = BadNets(target=target, rate=rate)
    if round(rate * count) == 0:
        with pytest.raises(ConfigurationError, match=f"poisons none of {count} images"):
            poison(clean, attack, seeded())
        return
    result = poison(clean, attack, seeded())
    hit = result.poisoned
    assert hit.sum() == round(rate * count)
    assert torch.equal(result.data.images[~hit], images[~hit])
    assert torch.equal(result.data.labels[~hit], labels[~hit])
    assert (result.data.labels[hit] == target).all()
    expected = attack.trigger((3, 6, 6))(clean.pixels(hit))
    assert torch.allclose(result.data.pixels(hit), expected, atol=1e-6)
    assert result.data.images.dtype == dtype
    assert result.data.class_names == clean.class_names
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)


def test_poison_is_seeded():
    before = torch.get_rng_state()
    first, again, other = (poison(data(), BadNets(), seeded(s)).poisoned for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_class_is_drawn_from():
    hit = torch.zeros(40, dtype=torch.bool)
    for seed in range(80):
        hit |= poison(data(), BadNets(rate=0.1), seeded(seed)).poisoned
    assert hit.all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("target", [0, 3])
def test_triggered_leaves_out_the_target_class(dtype, target):
    clean = data(dtype=dtype)
    images = clean.images.clone()
    trigger = BadNets().trigger(clean.shape)
    result = triggered(clean, trigger, target)
    rest = clean.labels != target
    assert torch.equal(result.labels, clean.labels[rest])
    assert torch.allclose(result.pixels(), trigger(clean.pixels(rest)), atol=1e-6)
    assert result.images.dtype == dtype
    assert torch.equal(clean.images, images)


def test_triggered_without_any_other_class():
    only = ImageSet(data().images, torch.zeros(40, dtype=torch.int64))
    assert len(triggered(only, BadNets().trigger(only.shape), 0)) == 0


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
def test_rates_outside_0_1(rate):
    with pytest.raises(ConfigurationError, match=r"the poisoning rate must lie in \(0, 1\], got"):
        poison(data(), BadNets(rate=rate), seeded())


@pytest.mark.parametrize("target", [-1, 4])
def test_targets_that_are_no_class(target):
    with pytest.raises(ConfigurationError, match=rf"class index in 0\.\.3, got {target}"):
        poison(data(), BadNets(target=target), seeded())
