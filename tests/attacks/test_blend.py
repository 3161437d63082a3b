"""Blend against its closed form."""

from __future__ import annotations

import pytest
import torch

from reprune.attacks import Blend, poison
from reprune.attacks.blend import random_pixels
from reprune.data import ImageSet
from reprune.errors import ConfigurationError

SHAPE = (3, 6, 5)


def data() -> ImageSet:
    images = torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(1))
    return ImageSet(images, torch.arange(30) % 3)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
def test_the_mixture(alpha):
    pixels, pattern = data().pixels(), random_pixels(SHAPE, 0)
    expected = (1 - alpha) * pixels + alpha * pattern
    torch.testing.assert_close(Blend(alpha=alpha).trigger(SHAPE)(pixels), expected)
    assert 0 <= pattern.min() < 0.1
    assert 0.9 < pattern.max() < 1


def test_the_pattern_belongs_to_the_attack():
    assert torch.equal(random_pixels(SHAPE, 0), random_pixels(SHAPE, 0))
    first, second = (Blend(pattern_seed=seed).trigger(SHAPE).add for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_weaker_pattern_after_training():
    made = poison(data(), Blend(test_alpha=0.1, rate=0.3), torch.Generator().manual_seed(0))
    rows, pattern = made.poisoned, random_pixels(SHAPE, 0)
    before = data().pixels(rows)
    torch.testing.assert_close(made.data.pixels(rows), 0.8 * before + 0.2 * pattern)
    torch.testing.assert_close(made.trigger(before), 0.9 * before + 0.1 * pattern)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.1}, {"test_alpha": -0.1}])
def test_alpha_out_of_range(settings):
    with pytest.raises(ConfigurationError, match=r"alpha must lie in \(0, 1\], got"):
        poison(data(), Blend(**settings), torch.Generator())
