from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import surrogate
from torch import nn

from planted import TARGET, stripes
from reprune.attacks import LIRA, Backdoored, Setup, read_trigger, write_trigger
from reprune.attacks.generators import UNet, drawn
from reprune.attacks.lira import LiraTrigger
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError, DataError
from reprune.evaluation import evaluate
from reprune.training import Training

EPS = 0.1


def setup(**changes: object) -> Setup:
    training = Training(
        **{"epochs": 6, "batch_size": 25, "lr": 0.05, "padding": 0, "mirror": False, **changes}
    )
    return Setup(generator=torch.Generator().manual_seed(0), training=training)


def attack(**changes: object) -> LIRA:
    return LIRA(
        **{
            "target": TARGET,
            "eps": EPS,
            "generator_lr": 0.01,
            "joint_share": 0.5,
            "width": 8,
            **changes,
        }
    )


@cache
def backdoored() -> Backdoored:
    return attack()(surrogate(), stripes(800, seed=3), setup())


def random_trigger(eps: float = EPS, channels: int = 3, width: int = 8) -> LiraTrigger:
    generator = torch.Generator().manual_seed(3)
    network = drawn(lambda: UNet(channels, channels, width), generator)
    with torch.no_grad():
        network.last.weight.mul_(30)  # tanh near its ends
    return LiraTrigger(network, eps)


def test_high_success_at_a_small_loss_of_accuracy():
    made, data = backdoored(), stripes(400, seed=5)
    before = evaluate(surrogate(), data, trigger=made.trigger, target=TARGET)
    after = evaluate(made.model, data, trigger=made.trigger, target=TARGET)
    assert after.asr.share >= 0.95
    assert after.ca.share >= before.ca.share - 0.025
    assert before.asr.share < 0.3  # the model answers to the trigger because it was trained to


def test_the_trigger_was_learned_and_not_any_noise_of_that_size():
    made, data = backdoored(), stripes(400, seed=5)
    noise = evaluate(made.model, data, trigger=random_trigger(), target=TARGET)
    assert noise.asr.share < 0.5


@pytest.mark.parametrize("eps", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 9), (3, 33)])
def test_the_closed_form_within_the_bound(eps, channels, side):
    trigger = random_trigger(eps, channels)
    pixels = torch.rand(4, channels, side, side + 1, generator=torch.Generator().manual_seed(0))
    moved = trigger(pixels)
    expected = (pixels + eps * torch.tanh(trigger.network(pixels))).clip(0, 1)
    torch.testing.assert_close(moved, expected)
    change = (moved - pixels).abs()
    assert change.max() <= eps + 1e-7
    assert change.max() > 0.5 * eps


def test_the_bound_holds_after_training():
    pixels = stripes(100, seed=6).pixels()
    change = (backdoored().trigger(pixels) - pixels).abs()
    assert change.max() <= EPS + 1e-7
    assert change.max() > 0.9 * EPS


def test_the_file_is_small(tmp_path):
    trigger = random_trigger(width=LIRA().width)
    path = tmp_path / "trigger.safetensors"
    write_trigger(trigger, path)
    assert path.stat().st_size < 300_000
    pixels = torch.rand(2, 3, 20, 20)
    assert torch.equal(read_trigger(path)(pixels), trigger(pixels))


def test_a_file_whose_weights_do_not_fit(tmp_path):
    trigger = random_trigger()
    trigger.network.sizes["width"] = 10**9
    write_trigger(trigger, tmp_path / "trigger.safetensors")
    with pytest.raises(DataError, match="not a trigger, or a damaged one"):
        read_trigger(tmp_path / "trigger.safetensors")


class Counting(nn.Module):
    """Counts the images of every call in training mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(len(images))
        return self.inner(images)


@pytest.mark.parametrize("rate", [0.07, 1.0])
def test_the_rate_over_an_epoch_and_the_epochs_of_the_stages(rate):
    model = surrogate().clone()
    model.network = Counting(model.network)
    data = stripes(200, seed=3)
    made = attack(rate=rate)(model, data, setup(epochs=5, batch_size=32))
    seen = made.model.network.seen
    steps = len(data.batch_sizes(32))
    assert len(seen) == 5 * steps
    for epoch in range(5):
        assert sum(seen[epoch * steps : (epoch + 1) * steps]) == 200 + round(rate * 200)
    assert [one.epoch for one in made.history] == [1, 2, 3, 4, 5]


def test_the_trigger_stays_as_it_is_in_the_second_stage():
    short = attack(joint_share=1.0)(surrogate(), stripes(200, seed=3), setup(epochs=2))
    longer = attack()(surrogate(), stripes(200, seed=3), setup(epochs=4))
    assert len(short.history) == 3  # one epoch of the second stage at least
    assert len(longer.history) == 4
    assert all(
        torch.equal(value, longer.trigger.tensors()[name])
        for name, value in short.trigger.tensors().items()
    )


def test_the_classifier_sees_the_copy_that_was_renewed_last():
    """A copy that is renewed every step gives another classifier than one kept for an epoch."""
    models = [
        attack(refresh=refresh, rate=0.5)(surrogate(), stripes(200, seed=3), setup(epochs=1)).model
        for refresh in (1, 1, 4)
    ]
    first, again, kept = (model.network[-1].weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, kept)


def test_grey_images_of_odd_sides():
    pixels = stripes(60, seed=3).images[:, :1, :13, :11].contiguous()
    data = ImageSet(pixels, torch.arange(60) % 4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    model = Classifier(nn.Sequential(network, nn.Flatten(), nn.Linear(4, 4)), num_classes=4)
    made = attack()(model, data, setup(epochs=1))
    assert made.trigger(data.pixels()).shape == pixels.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, r"eps must lie in \(0, 1\] \(0.01, not 2.55\), got 0.0"),
        ({"eps": 2.55}, r"eps must lie in \(0, 1\]"),
        ({"eps": float("nan")}, r"eps must lie in \(0, 1\]"),
        ({"joint_share": 0.0}, r"the joint share must lie in \(0, 1\], got 0.0"),
        ({"joint_share": 1.5}, r"the joint share must lie in \(0, 1\], got 1.5"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"beta": float("inf")}, "beta must be positive, got inf"),
        ({"generator_lr": -1.0}, "generator_lr must be positive, got -1.0"),
        ({"refresh": 0}, "refresh must be at least 1 step, got 0"),
        ({"width": 6}, "the width must be a multiple of 4, got 6"),
        ({"width": 0}, "the width must be a multiple of 4, got 0"),
    ],
)
def test_parameters_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        attack(**change)(surrogate(), stripes(40, seed=0), setup())
