"""Where plain waves lead the images, by hand on models that answer to one wave."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from reprune.attacks import SIG
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection import Led, Wave, WaveSearch, lead_by_waves
from reprune.detection.signs import wave_sign
from reprune.errors import ConfigurationError


class Ear(nn.Module):
    """Class 1 is as likely as a wave of these periods is strong; class 0 is usual."""

    def __init__(self, across: int, down: int, side: int = 16) -> None:
        super().__init__()
        at = 2 * math.pi * torch.arange(side) / side
        phase = across * at + down * at[:, None]
        self.register_buffer("waves", torch.stack([phase.sin(), phase.cos()]).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        heard = (images.mean(1).flatten(1) @ self.waves.T).norm(dim=1)
        usual = torch.full_like(heard, 5.0)
        return torch.stack([usual, heard, 0 * usual, 0 * usual], 1)


@pytest.fixture
def data() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = 118 + torch.randint(20, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(40) % 4)


def search(model: Classifier, data: ImageSet, settings: WaveSearch) -> Led:
    return lead_by_waves(model, data, settings, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("wave", [Wave(6, 0), Wave(0, 3), Wave(4, 4), Wave(5, -5)])
def test_the_wave_that_a_model_answers_to_is_found(wave, data, unchanged):
    model = Classifier(Ear(*wave), num_classes=4)
    with unchanged(model):
        led = search(model, data, WaveSearch(frequencies=7))
    label, ratio = led.leader()
    assert label == 1
    assert ratio > 100
    assert led.waves[led.best(1)[0]] == wave
    assert led.chances[led.best(1)[0], 1] > 0.95
    assert led.chances[led.best(1)[1], 1] < 0.1
    (sign,) = wave_sign(led, 4.0, 0.9)
    assert (sign.label, sign.strength > 1) == (1, True)
    assert f"{wave.across} periods across and {wave.down} down" in sign.reason


def test_images_that_were_there_before_do_not_count():
    """All images are class 0 and stay there: no class gains anything."""
    model = Classifier(Ear(1, 0), num_classes=4)
    flat = ImageSet(torch.full((8, 3, 16, 16), 0.5), torch.zeros(8, dtype=torch.long))
    led = search(model, flat, WaveSearch(frequencies=2, amplitude=1e-6))
    assert led.chances[:, 0].max() == 0
    assert led.leader()[1] == pytest.approx(1, rel=0.2)
    assert wave_sign(led, 4.0, 0.9)[0].strength < 0.2


def test_pulls_are_compared_with_the_next_class():
    chances = torch.tensor([[0.1, 0.75, 0.2], [0.5, 0.3, 0.1]])
    led = Led((Wave(1, 0), Wave(0, 1)), chances, 0.1)
    assert led.leader() == (1, pytest.approx(2.0))  # a quarter stays, and a half
    assert led.best(1) == [0, 1]
    assert wave_sign(led, 4.0, 0.9)[0].strength == pytest.approx(0.5)
    assert wave_sign(led, 1.5, 0.9)[0].strength == pytest.approx(0.75 / 0.9)


def test_sig_is_one_of_the_waves():
    shape = (3, 32, 32)
    search = WaveSearch(amplitude=20 / 255)
    (same,) = [w for w in search.waves() if w == (6, 0)]
    assert torch.equal(same.stamp(shape, 20 / 255).add, SIG().trigger(shape).add)
    assert len(set(search.waves())) == 64
    assert search.passes(500) == 65 * 128 / 500


def test_outputs_that_are_not_finite_are_not_usable(data):
    class Broken(Ear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * math.nan

    assert not search(Classifier(Broken(1, 0), num_classes=4), data, WaveSearch(images=4)).usable


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (WaveSearch(frequencies=0), "frequencies"),
        (WaveSearch(images=0), "images"),
        (WaveSearch(amplitude=0.0), "amplitude"),
        (WaveSearch(amplitude=math.nan), "amplitude"),
    ],
)
def test_settings_that_cannot_work(settings, name):
    with pytest.raises(ConfigurationError, match=name):
        settings.check()
