"""SIG against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reprune.attacks import SIG, poison
from reprune.data import ImageSet
from reprune.errors import ConfigurationError


def grey(count: int = 40, side: int = 32) -> ImageSet:
    images = torch.full((count, 3, side, side), 128, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4)


@pytest.mark.parametrize(
    ("settings", "delta", "frequency"),
    [({}, 20 / 255, 6), ({"delta": 0.1, "frequency": 2.5}, 0.1, 2.5)],
)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 20, 48)])
def test_the_sinusoid_runs_along_the_columns(settings, delta, frequency, shape):
    pixels = torch.full((2, *shape), 0.5)
    column = np.arange(shape[2])
    wave = delta * np.sin(2 * np.pi * column * frequency / shape[2])
    expected = np.broadcast_to(0.5 + wave, pixels.shape)
    np.testing.assert_allclose(SIG(**settings).trigger(shape)(pixels), expected, atol=1e-6)


def test_pixels_stay_in_range():
    pixels = torch.cat([torch.zeros(1, 3, 8, 16), torch.ones(1, 3, 8, 16)])
    changed = SIG().trigger((3, 8, 16))(pixels)
    assert changed.min() == 0
    assert changed.max() == 1
    assert (changed[0] > 0).any()
    assert (changed[1] < 1).any()


def test_another_amplitude_after_training():
    made = poison(grey(), SIG(test_delta=0.2), torch.Generator().manual_seed(0))
    trained = made.data.pixels(made.poisoned) - 128 / 255
    shown = made.trigger(torch.full((1, 3, 32, 32), 0.5)) - 0.5
    # Six periods in 32 columns: the largest sine is sin(2 pi 15 / 16 + ...) = sin(3 pi / 8).
    peak = np.sin(2 * np.pi * np.arange(32) * 6 / 32).max()
    assert float(trained.abs().max()) == pytest.approx(20 / 255 * peak, abs=1 / 255)
    assert float(shown.abs().max()) == pytest.approx(0.2 * peak, abs=1e-5)
    assert (made.data.labels[made.poisoned] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 20}, r"delta must lie in \(0, 1\] \(20/255, not 20\), got 20"),
        ({"delta": 0.0}, "delta must lie"),
        ({"test_delta": -0.1}, "delta must lie"),
        ({"frequency": 0.0}, "the frequency must be positive, got 0"),
        ({"frequency": float("inf")}, "the frequency must be positive, got inf"),
    ],
)
def test_parameters_out_of_range(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        poison(grey(), SIG(**settings), torch.Generator())
