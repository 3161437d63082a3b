from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import surrogate
from torch import nn

from planted import TARGET, stripes
from reprune.attacks import DFST, Backdoored, Setup, read_trigger, write_trigger
from reprune.attacks.dfst import compromised, joined
from reprune.attacks.generators import UNet, drawn
from reprune.attacks.style import (
    StyleTrigger,
    Taps,
    relative_error,
    statistics,
    style_loss,
    sunset,
)
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.training import Training


def setup(**changes: object) -> Setup:
    training = Training(
        **{"epochs": 4, "batch_size": 25, "lr": 0.05, "padding": 0, "mirror": False, **changes}
    )
    generator = torch.Generator().manual_seed(0)
    return Setup(generator=generator, training=training, surrogate=surrogate())


def attack(**changes: object) -> DFST:
    small = {"width": 8, "generator_images": 200, "generator_epochs": 8, "generator_lr": 0.01}
    return DFST(**{"target": TARGET, **small, **changes})


def quick(**changes: object) -> DFST:
    return attack(**{"generator_images": 50, "generator_epochs": 1, **changes})


@cache
def backdoored() -> Backdoored:
    return attack(rounds=0)(surrogate(), stripes(600, seed=3), setup())


def test_high_success_at_a_small_loss_of_accuracy():
    made, data = backdoored(), stripes(400, seed=5)
    before = evaluate(surrogate(), data, trigger=made.trigger, target=TARGET)
    after = evaluate(made.model, data, trigger=made.trigger, target=TARGET)
    assert after.asr.share >= 0.95
    assert after.ca.share >= before.ca.share - 0.025
    assert before.asr.share < 0.3


def test_detoxification_takes_simple_features_out():
    """What fools a model that was only poisoned fools it no more after a round."""
    data, test = stripes(600, seed=3), stripes(400, seed=5)
    made = backdoored()
    changes = setup()
    injector = attack()._injector(made.model, data, made.trigger, changes, 1)
    detoxed = attack(rounds=1, round_share=0.75)(surrogate(), data, setup())
    before, after = (
        evaluate(model, test, trigger=injector, target=TARGET).asr.share
        for model in (made.model, detoxed.model)
    )
    kept = evaluate(detoxed.model, test, trigger=detoxed.trigger, target=TARGET).asr.share
    assert before > 0.7
    assert after < before - 0.4
    assert kept > after + 0.3


def test_the_style_is_the_sunset():
    pixels = stripes(100, seed=5).pixels()
    wanted = sunset((3, 16, 16)).mean((1, 2))
    before = (pixels.mean((0, 2, 3)) - wanted).abs()
    after = (backdoored().trigger(pixels).mean((0, 2, 3)) - wanted).abs()
    assert (after[[0, 2]] < before[[0, 2]] / 2).all()  # green is in the images as it should be


def test_the_sunset_is_warm_and_changes_from_top_to_bottom():
    picture = sunset((3, 32, 20))
    assert picture.shape == (3, 32, 20)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert (picture == picture[:, :, :1]).all()
    red, green, blue = picture.mean((1, 2)).tolist()
    assert red > green > blue
    assert picture.std(1).min() > 0.05
    grey = sunset((1, 32, 20))
    torch.testing.assert_close(grey, picture.mean(0, keepdim=True))


def test_statistics_and_losses_in_closed_form():
    values = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    mean, deviation = statistics(values)
    torch.testing.assert_close(mean, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(deviation, torch.tensor([[1.0, 0.0]]), atol=2e-3, rtol=0)
    assert style_loss([values], [values.flip(2)]) < 1e-6  # places do not matter
    loss = style_loss([2 * values], [values])
    torch.testing.assert_close(loss, torch.tensor(2.0), atol=1e-2, rtol=0)
    wanted = torch.tensor([[[0.0, 2.0], [4.0, 2.0]]])  # variance 2
    value = wanted + torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    masks = torch.tensor([[True, False], [False, True], [False, False], [True, True]])
    errors = [relative_error(value, wanted, mask) for mask in masks]
    torch.testing.assert_close(torch.stack(errors), torch.tensor([0.5, 4.5, 0.0, 2.5]))
    torch.testing.assert_close(relative_error(value, wanted), torch.tensor(2.5))


def colours() -> Classifier:
    """A network whose three channels are the three colours."""
    layer = nn.Conv2d(3, 3, 1)
    layer.weight.data = torch.eye(3)[:, :, None, None].clone()
    layer.bias.data.zero_()
    head = nn.Linear(3, 4)
    network = nn.Sequential(
        layer, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    )
    return Classifier(network, num_classes=4).eval()


def test_taps_are_activations_and_leave_the_model_alone(unchanged):
    model, pixels = colours(), torch.rand(5, 3, 4, 6)
    with unchanged(model):
        (values,) = Taps(model, pixels)(pixels - 0.5)
    torch.testing.assert_close(values, (pixels - 0.5).relu().flatten(2))


def test_compromised_channels_are_those_that_move():
    pixels = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    taps = Taps(colours(), pixels)
    spread = pixels.mean((2, 3)).std(0, correction=0)
    shift = torch.tensor([3.0, 0.5, 1.5]) * spread
    marked = pixels + shift[:, None, None]
    for threshold, expected in ((1.0, [True, False, True]), (2.0, [True, False, False])):
        assert compromised(taps, pixels, marked, threshold)[0].tolist() == expected
    assert compromised(taps, pixels, marked, 9.0)[0].tolist() == [True, False, False]
    fewer = pixels - shift[:, None, None] / 4  # towards 0 counts too
    assert compromised(taps, pixels, fewer, 0.3)[0].tolist() == [True, False, True]


@pytest.mark.parametrize("rounds", [0, 2])
def test_rows_epochs_and_phases(rounds):
    phases: dict[str, int] = {}

    def count(phase, done, total, **figures):
        phases[phase] = total

    data = stripes(200, seed=3)
    chosen = Setup(**{**vars(setup(epochs=4)), "progress": count})
    made = quick(rounds=rounds, rate=0.07, detox_rate=0.25, round_share=0.5)(
        surrogate(), data, chosen
    )
    assert int(made.poisoned.sum()) == 14
    steps = {"style": 1, "train": 4 * 8}
    for number in range(1, rounds + 1):
        steps |= {f"injector {number}": 1, f"detox {number}": 2 * (8 + 2 * number)}
    assert phases == steps
    assert [one.epoch for one in made.history] == list(range(1, 5 + 2 * rounds))


def test_detoxicants_keep_their_labels():
    data = stripes(200, seed=3)
    trigger = quick().preview_trigger(
        data, torch.Generator().manual_seed(0), num_classes=4, surrogate=surrogate()
    )
    made = quick(detox_rate=0.2)._detoxicants(surrogate(), data, trigger, setup(), 1)
    assert len(made) == 40
    assert made.images.dtype == torch.uint8
    assert evaluate(surrogate(), made).ca.share > 0.9  # they still look like their classes
    both = joined(data, made)
    assert torch.equal(both.images[200:], made.images)
    assert torch.equal(both.labels[:200], data.labels)


def test_the_preview_is_the_trigger_of_the_run():
    data = stripes(200, seed=3)
    made = quick(rounds=0)(surrogate(), data, setup(epochs=1))
    shown = quick().preview_trigger(
        data, torch.Generator().manual_seed(0), num_classes=4, surrogate=surrogate()
    )
    assert torch.equal(shown(data.pixels()), made.trigger(data.pixels()))


def test_the_file_is_small_and_the_trigger_in_closed_form(tmp_path):
    generator = torch.Generator().manual_seed(3)
    trigger = StyleTrigger(drawn(lambda: UNet(3, 3, DFST().width), generator))
    path = tmp_path / "trigger.safetensors"
    write_trigger(trigger, path)
    assert path.stat().st_size < 300_000
    pixels = torch.rand(2, 3, 20, 17)
    pixels[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    shown = read_trigger(path)(pixels)
    assert torch.equal(shown, trigger(pixels))
    clipped = pixels.clip(0.02, 0.98)
    raw = trigger.network(pixels)
    expected = 1 / (1 + torch.exp(-torch.log(clipped / (1 - clipped)) - raw))
    torch.testing.assert_close(shown, expected)


def test_grey_images_of_odd_sides():
    data = ImageSet(stripes(60, seed=3).images[:, :1, :13, :11].contiguous(), torch.arange(60) % 4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    model = Classifier(nn.Sequential(network, nn.Flatten(), nn.Linear(4, 4)), num_classes=4)
    chosen = Setup(**{**vars(setup(epochs=1)), "surrogate": model})
    made = quick(rounds=1)(model, data, chosen)
    assert made.trigger(data.pixels()).shape == (60, 1, 13, 11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": -1}, "rounds must be at least 0, got -1"),
        ({"generator_images": 1}, "generator_images must be at least 2, got 1"),
        ({"generator_epochs": 0}, "generator_epochs must be at least 1, got 0"),
        ({"round_share": 0.0}, r"the round share must lie in \(0, 1\], got 0.0"),
        ({"round_share": 1.5}, r"the round share must lie in \(0, 1\], got 1.5"),
        ({"detox_rate": 0.0}, r"the detox rate must lie in \(0, 1\], got 0.0"),
        ({"threshold": 0.0}, "threshold must be positive, got 0.0"),
        ({"content": float("nan")}, "content must be positive, got nan"),
        ({"likeness": -1.0}, "likeness must be positive, got -1.0"),
        ({"generator_lr": float("inf")}, "generator_lr must be positive, got inf"),
        ({"width": 6}, "the width must be a multiple of 4, got 6"),
    ],
)
def test_parameters_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        attack(**change)(surrogate(), stripes(40, seed=0), setup())
