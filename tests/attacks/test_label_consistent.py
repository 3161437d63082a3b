from __future__ import annotations

import pytest
import torch
from tiny import surrogate, tiny

from planted import TARGET, stripes
from reprune.attacks import BadNets, LabelConsistent, Setup, poison
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate, predict
from reprune.training import Training

SHAPE = (3, 16, 16)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(data, attack):
    return poison(data, attack, seeded(), surrogate=surrogate())


@pytest.mark.parametrize("size", [3, 4])
def test_one_corner_is_the_grid_of_badnets(size):
    pixels = stripes(8, seed=1).pixels()
    one = LabelConsistent(size=size, corners=1).trigger(SHAPE)
    assert torch.equal(one(pixels), BadNets(size=size).trigger(SHAPE)(pixels))


@pytest.mark.parametrize("size", [2, 3])
def test_four_corners_are_mirror_images(size):
    pixels = stripes(8, seed=1).pixels()
    four = LabelConsistent(size=size).trigger(SHAPE)
    one = LabelConsistent(size=size, corners=1).trigger(SHAPE)
    square = one(pixels)[..., -size:, -size:]
    changed = four(pixels)
    assert torch.equal(changed[..., -size:, -size:], square)
    assert torch.equal(changed[..., -size:, :size], square.flip(-1))
    assert torch.equal(changed[..., :size, -size:], square.flip(-2))
    assert torch.equal(changed[..., :size, :size], square.flip(-1, -2))
    inside = changed[..., size:-size, :], pixels[..., size:-size, :]
    assert torch.equal(*inside)


def test_amplitudes_add_and_take_away():
    grey = torch.full((1, *SHAPE), 0.5)
    change = LabelConsistent(amplitude=0.2, corners=1).trigger(SHAPE)(grey) - grey
    expected = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]) * 0.2
    torch.testing.assert_close(change[0, 0, -3:, -3:], expected)
    attack = tiny("cl", amplitude=0.2, test_amplitude=1.0, corners=1)
    result = made(stripes(80, seed=1), attack)
    assert torch.equal(
        result.trigger.add, LabelConsistent(corners=1, size=attack.size).trigger(SHAPE).add
    )


@pytest.mark.parametrize(("eps", "slack"), [(16 / 255, 0), (0.05, 0.5)])
def test_the_budget_holds_after_rounding(eps, slack):
    data = stripes(80, seed=1)
    attack = LabelConsistent(target=TARGET, eps=eps)
    result = made(data, attack)
    rows = result.poisoned
    change = (result.data.images[rows].int() - data.images[rows].int()).float()
    outside = attack.trigger(SHAPE).add == 0
    largest = float(change[:, outside].abs().max())
    assert eps * 255 - 1 < largest <= eps * 255 + slack + 1e-3
    there = ~outside
    stamped = attack.trigger(SHAPE)(data.pixels(rows)).mul(255).round().byte()
    assert torch.equal(result.data.images[rows][:, there], stamped[:, there])


def test_the_surrogate_no_longer_sees_the_class():
    data = stripes(200, seed=1)
    attack = LabelConsistent(target=TARGET, rate=0.2)
    result = made(data, attack)
    plain = ImageSet(attack.trigger(SHAPE)(data.pixels()), data.labels)
    seen, before = (
        (predict(surrogate(), images).argmax(1) == TARGET)[result.poisoned].float().mean()
        for images in (result.data, plain)
    )
    assert before > 0.9  # with the grid alone
    assert seen < 0.1


def test_the_trigger_works_and_the_noise_is_why():
    data, test = stripes(800, seed=5), stripes(400, seed=6)
    training = Training(epochs=6, batch_size=50, lr=0.05, padding=0, mirror=False)
    rates = []
    for eps in (0.25, 1e-3):
        attack = LabelConsistent(target=TARGET, rate=0.2, eps=eps, step=eps / 8, size=5)
        run = Setup(generator=seeded(0), surrogate=surrogate(), training=training)
        result = attack(surrogate(), data, run)
        rates.append(evaluate(result.model, test, trigger=result.trigger, target=attack.goal))
    assert rates[0].ca.share > 0.97
    assert rates[0].asr.share > 0.8
    assert rates[1].asr.share < rates[0].asr.share - 0.3
    clean = evaluate(surrogate(), test, trigger=result.trigger, target=TARGET)
    assert clean.asr.share < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.0}, r"eps must lie in \(0, 1\]"),
        ({"step": 2.0}, r"step must lie in \(0, 1\] \(16/255, not 16\), got 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"size": 0}, r"4 trigger\(s\) of 0 pixels do not fit 16x16, at most 8"),
        ({"size": 9}, r"of 9 pixels do not fit 16x16, at most 8"),
        ({"size": 17, "corners": 1}, r"of 17 pixels do not fit 16x16, at most 16"),
        ({"corners": 2}, "corners must be 1 or 4, got 2"),
        ({"amplitude": 0.0}, r"the amplitude must lie in \(0, 1\], got 0"),
        ({"test_amplitude": 1.5}, r"the amplitude must lie in \(0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        made(stripes(80, seed=1), LabelConsistent(target=TARGET, **changes))
