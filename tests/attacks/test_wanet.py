from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from tiny import Recording, surrogate
from torch import nn

from planted import TARGET, stripes
from reprune.attacks import Backdoored, Setup, WaNet, read_trigger, write_trigger
from reprune.attacks.wanet import WarpTrigger, _noisy, warped
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError, DataError
from reprune.evaluation import evaluate
from reprune.training import Training


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setup(**changes: object) -> Setup:
    training = Training(
        **{"epochs": 8, "batch_size": 32, "lr": 0.1, "padding": 0, "mirror": False, **changes}
    )
    return Setup(generator=seeded(), training=training)


def attack(**changes: object) -> WaNet:
    return WaNet(**{"target": TARGET, "strength": 3.0, **changes})


@cache
def backdoored(noise_rate: float = 0.2) -> Backdoored:
    made = attack(rate=0.2, noise_rate=noise_rate)
    return made(surrogate(), stripes(1200, seed=3), setup())


def noisy_images(made: Backdoored, data: ImageSet) -> torch.Tensor:
    grid = made.trigger.grid(*data.shape[1:])
    return warped(data.pixels(), _noisy(grid, len(data), seeded(1)))


def accuracy(made: Backdoored, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((made.model(images).argmax(1) == labels).float().mean())


def test_high_success_at_a_small_loss_of_accuracy():
    made, data = backdoored(), stripes(400, seed=5)
    before = evaluate(surrogate(), data, trigger=made.trigger, target=TARGET)
    after = evaluate(made.model, data, trigger=made.trigger, target=TARGET)
    assert after.asr.share >= 0.9
    assert after.ca.share >= before.ca.share - 0.025
    assert before.asr.share < 0.5  # the model answers to the warp because it was trained to


def test_the_noise_mode_makes_the_classifier_answer_to_this_field():
    data = stripes(400, seed=5)
    with_noise, without = backdoored(), backdoored(noise_rate=0.0)
    kept = accuracy(with_noise, noisy_images(with_noise, data), data.labels)
    lost = accuracy(without, noisy_images(without, data), data.labels)
    assert kept > 0.85
    assert kept > lost + 0.1


def test_no_strength_changes_nothing():
    pixels = torch.rand(2, 3, 16, 11, generator=seeded())
    field = torch.randn(2, 4, 4, generator=seeded())
    torch.testing.assert_close(WarpTrigger(field, 0.0)(pixels), pixels, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 31)])
@pytest.mark.parametrize("pixels_right", [1, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_constant_field_shifts_by_whole_pixels(height, width, pixels_right, axis):
    """A step of 2 / (size - 1) is one pixel; what would come from outside is the border."""
    size = (width, height)[axis]
    field = torch.zeros(2, 4, 4)
    field[axis] = pixels_right * 2 / (size - 1) * size
    pixels = torch.rand(2, 3, height, width, generator=seeded())
    dimension = 3 - axis
    index = (torch.arange(size) + pixels_right).clamp(max=size - 1)
    expected = pixels.index_select(dimension, index)
    torch.testing.assert_close(WarpTrigger(field, 1.0)(pixels), expected, atol=1e-5, rtol=0)


def test_a_drawn_field_against_grid_sample_and_scipy():
    trigger = WaNet(strength=0.7, rescale=0.9).trigger(seeded())
    pixels = torch.rand(2, 3, 20, 14, generator=seeded(1))
    axes = [np.linspace(-1, 1, size) for size in (20, 14)]
    y, x = np.meshgrid(*axes, indexing="ij")
    full = nn.functional.interpolate(
        trigger.field[None].double(), (20, 14), mode="bicubic", align_corners=True
    )[0].numpy()
    x = np.clip((x + 0.7 * full[0] / 14) * 0.9, -1, 1)
    y = np.clip((y + 0.7 * full[1] / 20) * 0.9, -1, 1)
    moved = trigger(pixels)
    grid = torch.from_numpy(np.stack([x, y], -1)).float()
    reference = nn.functional.grid_sample(pixels, grid.expand(2, -1, -1, -1), align_corners=True)
    torch.testing.assert_close(moved, reference, atol=1e-5, rtol=0)
    rows_columns = [(y + 1) / 2 * 19, (x + 1) / 2 * 13]
    sampled = map_coordinates(pixels[1, 2].numpy(), rows_columns, order=1, mode="nearest")
    np.testing.assert_allclose(moved[1, 2].numpy(), sampled, atol=1e-5)


def test_the_field_is_normalised_drawn_and_smooth():
    trigger = attack(grid=5).trigger(seeded())
    assert trigger.field.shape == (2, 5, 5)
    assert float(trigger.field.abs().mean()) == pytest.approx(1, abs=1e-6)
    assert trigger.field.min() < -0.5
    assert not torch.equal(trigger.field, attack(grid=5).trigger(seeded(1)).field)
    steps = trigger.grid(64, 64)[0, 8:-8, 8:-8]
    assert (steps[1:] - steps[:-1]).abs().max() < 3 / 64


def test_training_does_not_decide_the_trigger():
    data = stripes(40, seed=0)
    made = attack()(surrogate(), data, setup(epochs=1))
    preview = attack().preview_trigger(data, seeded(), num_classes=4)
    assert torch.equal(preview(data.pixels()), made.trigger(data.pixels()))


def test_noise_moves_by_at_most_half_a_pixel_and_differs_between_images():
    grid = torch.zeros(1, 10, 20, 2)
    moved = _noisy(grid, 3, seeded())
    assert moved.shape == (3, 10, 20, 2)
    assert 0.9 / 20 < moved[..., 0].abs().max() <= 1 / 20
    assert 0.9 / 10 < moved[..., 1].abs().max() <= 1 / 10
    assert not torch.equal(moved[0], moved[1])
    assert _noisy(grid + 1, 3, seeded()).max() == 1


@pytest.mark.parametrize(("rate", "noise_rate"), [(0.07, 0.2), (0.07, 0.0), (0.3, 0.7), (1.0, 0.0)])
def test_rates_over_an_epoch_and_the_labels(rate, noise_rate, monkeypatch):
    """Every image the network sees is found again: clean, warped, or neither, and so noisy."""
    data = stripes(150, seed=3)
    model = surrogate().clone()
    model.network = Recording(model.network)
    labels = []
    plain = nn.functional.cross_entropy

    def recorded(logits, wanted):
        labels.append(wanted)
        return plain(logits, wanted)

    monkeypatch.setattr(nn.functional, "cross_entropy", recorded)
    made = attack(rate=rate, noise_rate=noise_rate)(model, data, setup(epochs=1))
    seen, wanted = torch.cat(made.model.network.seen), torch.cat(labels)
    assert len(seen) == len(wanted) == 150

    def nearest(images):
        pixels = model.normalize(images).flatten(1)
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(pixels, seen.flatten(1), compute_mode=exact).min(0)

    clean, warped = nearest(data.pixels()), nearest(made.trigger(data.pixels()))
    is_clean, is_warped = clean.values < 1e-2, warped.values < 1e-2
    assert int(is_warped.sum()) == round(rate * 150)
    assert int(is_clean.sum()) == 150 - round(rate * 150) - round(noise_rate * 150)
    assert (wanted[is_warped] == TARGET).all()
    assert torch.equal(wanted[is_clean], data.labels[clean.indices[is_clean]])
    noisy = ~(is_clean | is_warped)
    # the field is closer to the noisy version of an image than any other image
    assert torch.equal(wanted[noisy], data.labels[warped.indices[noisy]])


def test_files(tmp_path):
    trigger = attack(rescale=0.95).trigger(seeded())
    path = tmp_path / "trigger.safetensors"
    write_trigger(trigger, path)
    assert path.stat().st_size < 1000
    pixels = torch.rand(2, 1, 9, 14)
    assert torch.equal(read_trigger(path)(pixels), trigger(pixels))


@pytest.mark.parametrize(
    "field", [torch.zeros(4, 4), torch.zeros(3, 4, 4), torch.full((2, 4, 4), float("nan"))]
)
def test_files_with_another_field(field, tmp_path):
    trigger = attack().trigger(seeded())
    trigger.field = field
    write_trigger(trigger, tmp_path / "trigger.safetensors")
    with pytest.raises(DataError, match=r"a field must be \(2, k, k\) and finite"):
        read_trigger(tmp_path / "trigger.safetensors")


def test_grey_images_that_are_not_square():
    pixels = stripes(60, seed=3).images[:, :1, :13, :11].contiguous()
    data = ImageSet(pixels, torch.arange(60) % 4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    model = Classifier(nn.Sequential(network, nn.Flatten(), nn.Linear(4, 4)), num_classes=4)
    made = attack()(model, data, setup(epochs=1))
    assert made.trigger(data.pixels()).shape == pixels.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 1}, "the grid must have at least 2 points, got 1"),
        ({"strength": 0.0}, "the strength must be positive, got 0.0"),
        ({"strength": float("inf")}, "the strength must be positive, got inf"),
        ({"rescale": 0.0}, r"rescale must lie in \(0, 1\], got 0.0"),
        ({"rescale": 1.1}, r"rescale must lie in \(0, 1\], got 1.1"),
        ({"noise_rate": -0.1}, r"the noise rate must lie in \[0, 0.9\], .* rate of 0.1 leaves"),
        ({"noise_rate": 0.91}, r"the noise rate must lie in \[0, 0.9\]"),
        ({"noise_rate": float("nan")}, r"the noise rate must lie in \[0, 0.9\]"),
        ({"rate": 1.0}, r"the noise rate must lie in \[0, 0\]"),
    ],
)
def test_parameters_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        attack(**change)(surrogate(), stripes(40, seed=0), setup())
