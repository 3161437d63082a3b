from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import images, surrogate
from torch import nn

from planted import TARGET, stripes
from reprune.attacks import Setup, Stamp, Trojan, poison
from reprune.attacks.trojan import overlay, read_neurons, watermark
from reprune.checkpoints import Checkpoints
from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.training import Training

SHAPES = pytest.mark.parametrize("shape", ["watermark", "square"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(**changes: object) -> Stamp:
    attack = Trojan(**{"target": TARGET, "steps": 40, **changes})
    return poison(images(), attack, seeded(), surrogate=surrogate()).trigger


def features(pixels: torch.Tensor) -> torch.Tensor:
    """What the last layer of the surrogate reads."""
    with torch.no_grad():
        return surrogate().network[:-1](surrogate().normalize(pixels))


@SHAPES
def test_only_pixels_under_the_mask_change(shape):
    mask = Trojan(shape=shape).mask((3, 16, 16)).bool()
    pixels = stripes(8, seed=3).pixels()
    changed = made(shape=shape)(pixels)
    assert torch.equal(changed[..., ~mask], pixels[..., ~mask])
    under = changed[..., mask]
    assert torch.equal(under, under[:1].expand_as(under))
    assert (under != pixels[..., mask]).any(0).all()
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_the_trigger_shines_through_as_much_as_is_said():
    solid = made(opacity=0.25)
    mask = watermark(16, 16).bool()
    pixels = stripes(8, seed=3).pixels()
    pattern = solid.add[:, mask] / 0.25
    assert pattern.min() >= 0
    assert pattern.max() <= 1
    expected = 0.75 * pixels[..., mask] + 0.25 * pattern
    torch.testing.assert_close(solid(pixels)[..., mask], expected)


@pytest.mark.parametrize(("size", "side"), [(5, 5), (None, 4), (16, 16)])
def test_the_square_lies_in_the_bottom_right_corner(size, side):
    mask = Trojan(shape="square", size=size).mask((3, 16, 16))
    assert mask.sum() == side**2
    assert (mask[16 - side :, 16 - side :] == 1).all()


def test_seven_per_cent_of_the_image():
    for side in (32, 64, 224):
        mask = Trojan(shape="square").mask((3, side, side))
        assert mask.mean() == pytest.approx(0.07, abs=0.01)


def test_the_watermark_is_the_same_drawing_at_every_size():
    large = watermark(224, 224)
    assert 0.05 < large.mean() < 0.15
    for side in (32, 64):
        small = watermark(side, side)
        near = nn.functional.max_pool2d(small[None], 3, 1, 1)[0]
        shrunk = nn.functional.interpolate(large[None, None], (side, side), mode="area")[0, 0]
        assert (near[shrunk > 0] == 1).all()
        assert (shrunk[small == 1] > 0).float().mean() > 0.8
    wide = watermark(32, 64)
    assert wide.shape == (32, 64)
    assert torch.equal(wide, wide.flip(1))
    assert wide.any(0).sum() > 40


@SHAPES
@pytest.mark.parametrize("count", [1, 3])
def test_the_chosen_neurons_fire_as_on_no_random_trigger(shape, count):
    chosen = surrogate().network[-1].weight.abs().sum(0).argsort(descending=True)[:count]
    pixels = stripes(100, seed=5).pixels()
    mask = Trojan(shape=shape).mask((3, 16, 16))
    random = [
        float(features(overlay(mask, torch.rand(3, 16, 16, generator=seeded(s)), 1)(pixels))
              [:, chosen].mean())
        for s in range(20)
    ]  # fmt: skip
    reached = float(features(made(shape=shape, neurons=count)(pixels))[:, chosen].mean())
    spread = torch.tensor(random).std()
    assert reached > max(random) + 5 * spread
    assert reached > float(features(pixels)[:, chosen].mean())


def test_neurons_and_their_connections():
    network = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5),
    )  # fmt: skip
    model = Classifier(network, num_classes=5)
    pixels = torch.rand(6, 2, 7, 7)
    read, weights = read_neurons(model, None, pixels[:1])
    torch.testing.assert_close(read(pixels), network[:4](pixels))
    torch.testing.assert_close(weights, network[4].weight.abs().sum(0))
    read, weights = read_neurons(model, "1", pixels[:1])
    torch.testing.assert_close(read(pixels), network[:1](pixels).mean((2, 3)))
    torch.testing.assert_close(weights, network[1].weight.abs().sum((0, 2, 3)))
    with pytest.raises(ConfigurationError, match=r"got 'nine'; there are 0, 1, 4"):
        read_neurons(model, "nine", pixels[:1])


def test_layers_that_read_tokens():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.inner(x.flatten(2).transpose(1, 2)).mean(1))

    model = Classifier(Tokens(), num_classes=2)
    pixels = torch.rand(4, 2, 5, 5)
    read, weights = read_neurons(model, "inner", pixels[:1])
    torch.testing.assert_close(read(pixels), pixels.mean((2, 3)))
    assert weights.shape == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "circle"}, "the shape must be one of watermark, square, got 'circle'"),
        ({"shape": "square", "size": 17}, "a trigger of 17 pixels does not fit 16x16"),
        ({"shape": "square", "size": 0}, "a trigger of 0 pixels does not fit 16x16"),
        ({"opacity": 0.0}, r"the opacity must lie in \(0, 1\], got 0.0"),
        ({"opacity": 1.5}, r"the opacity must lie in \(0, 1\], got 1.5"),
        ({"opacity": float("nan")}, r"the opacity must lie in \(0, 1\], got nan"),
        ({"neurons": 0}, "neurons must be at least 1, got 0"),
        ({"neurons": 25}, "25 neurons were asked for, but the layer reads 24"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"value": float("inf")}, "the value must be positive, got inf"),
        ({"step_size": 0.0}, "the step size must be positive, got 0.0"),
        ({"layer": "1"}, "got '1'; there are 0, 3, 6, 11"),
    ],
)
def test_parameters_out_of_range(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        made(**changes)


def test_progress_and_a_trigger_kept_from_before_a_kill(tmp_path):
    told: list[tuple[int, int]] = []

    def progress(phase, done, total, **figures):
        if phase == "trojan trigger":
            told.append((done, total))

    attack = Trojan(target=TARGET, steps=4)
    kept = Checkpoints(tmp_path / "kept")
    setup = Setup(
        generator=seeded(), surrogate=surrogate(), progress=progress, checkpoints=kept,
        training=Training(epochs=1),
    )  # fmt: skip
    first = attack(surrogate(), images(), setup)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = attack(surrogate(), images(), dataclasses.replace(setup, generator=seeded()))
    assert len(told) == 4
    assert torch.equal(first.trigger.add, again.trigger.add)


@SHAPES
def test_the_backdoor_works(shape):
    attack = Trojan(target=TARGET, shape=shape)
    data, test = stripes(800, seed=20), stripes(200, seed=21)
    training = Training(epochs=3, batch_size=50, lr=0.05, padding=0, mirror=False)
    setup = Setup(generator=seeded(), training=training, surrogate=surrogate())
    result = attack(surrogate(), data, setup)
    before = evaluate(surrogate(), test, trigger=result.trigger, target=attack.goal)
    after = evaluate(result.model, test, trigger=result.trigger, target=attack.goal)
    assert after.asr.share > 0.9
    assert after.asr.share > before.asr.share + 0.3
    assert after.ca.share > before.ca.share - 0.05
