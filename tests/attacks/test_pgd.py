from __future__ import annotations

import pytest
import torch
from tiny import images, surrogate
from torch import nn

from reprune.attacks.pgd import pgd
from reprune.classifier import Classifier
from reprune.errors import ConfigurationError

SETTINGS = {"eps": 8 / 255, "step": 3 / 255, "steps": 4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> Classifier:
    """Two classes; the second one gains by every pixel of the left half, and loses by the rest."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4)
    network[1].weight.data = torch.stack([-weight, weight])
    return Classifier(network, num_classes=2)


def test_a_linear_model_in_closed_form():
    pixels = torch.full((2, 1, 4, 4), 0.5)
    pixels[:, :, 0, 0], pixels[:, :, 0, 3] = 0.99, 0.98
    made = pgd(linear(), pixels, torch.tensor([0, 1]), eps=0.05, step=0.02, steps=2)
    direction = torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(4, 4)
    for one, image, sign in zip(made, pixels, (1, -1), strict=True):
        torch.testing.assert_close(one[0], (image[0] + sign * 0.04 * direction).clamp(0, 1))
    made = pgd(linear(), pixels, torch.tensor([0, 1]), eps=0.05, step=0.02, steps=9)
    for one, image, sign in zip(made, pixels, (1, -1), strict=True):
        torch.testing.assert_close(one[0], (image[0] + sign * 0.05 * direction).clamp(0, 1))


@pytest.mark.parametrize("start", [None, 0])
def test_the_budget_is_kept_and_used(start):
    data = images()
    pixels, labels = data.pixels(), data.labels
    before = pixels.clone()
    generator = None if start is None else seeded(start)
    made = pgd(surrogate(), pixels, labels, generator=generator, **SETTINGS)
    assert torch.equal(pixels, before)
    assert not made.requires_grad
    assert made.dtype == torch.float32
    assert made.min() >= 0
    assert made.max() <= 1
    assert float((made - pixels).abs().max()) == pytest.approx(8 / 255, abs=1e-6)


def test_the_loss_rises_far():
    data = images()
    made = pgd(surrogate(), data.pixels(), data.labels, eps=0.1, step=0.02, steps=10)
    with torch.no_grad():
        before = (surrogate()(data.pixels()).argmax(1) == data.labels).float().mean()
        after = (surrogate()(made).argmax(1) == data.labels).float().mean()
    assert before > 0.95
    assert after < 0.1


def test_the_start_is_drawn_within_the_budget():
    data = images()
    settings = {**SETTINGS, "step": 1e-9, "steps": 1}
    first, again, other = (
        pgd(surrogate(), data.pixels(), data.labels, generator=seeded(s), **settings)
        for s in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    change = (first - data.pixels())[(data.pixels() > 0.1) & (data.pixels() < 0.9)] * 255
    assert float(change.mean()) == pytest.approx(0, abs=0.1)
    assert float(change.std()) == pytest.approx(8 / 3**0.5, rel=0.02)
    none = pgd(surrogate(), data.pixels(), data.labels, **settings)
    torch.testing.assert_close(none, data.pixels(), atol=1e-6, rtol=0)


def test_batches_change_nothing():
    pixels, labels = images().pixels()[:30], images().labels[:30]
    whole = pgd(surrogate(), pixels, labels, batch_size=30, **SETTINGS)
    parts = pgd(surrogate(), pixels, labels, batch_size=7, **SETTINGS)
    assert ((whole - parts).abs() > 1e-5).float().mean() < 0.01  # a sign may hang on rounding


def test_progress_counts_images():
    told = []
    pgd(
        surrogate(),
        images().pixels()[:30],
        images().labels[:30],
        batch_size=20,
        progress=lambda phase, done, total, **figures: told.append((phase, done, total)),
        **SETTINGS,
    )
    assert told == [("pgd", 20, 30), ("pgd", 30, 30)]


def test_the_model_is_left_alone(unchanged):
    model = surrogate().clone()
    model.network[1].train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with unchanged(model), torch.no_grad():  # gradients are computed all the same
        made = pgd(model, images().pixels()[:8], images().labels[:8], **SETTINGS)
    assert not torch.equal(made, images().pixels()[:8])
    assert all((parameter.grad == 1).all() for parameter in model.parameters())

    def interrupt(phase, done, total, **figures):
        raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        pgd(model, images().pixels(), images().labels, progress=interrupt, **SETTINGS)


def test_no_images():
    pixels = images().pixels()[:0]
    assert pgd(surrogate(), pixels, images().labels[:0], **SETTINGS).shape == pixels.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0}, r"eps must lie in \(0, 1\] \(16/255, not 16\), got 0"),
        ({"eps": 16}, r"eps must lie in \(0, 1\] \(16/255, not 16\), got 16"),
        ({"step": float("nan")}, r"step must lie in .* got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        pgd(surrogate(), images().pixels(), images().labels, **{**SETTINGS, **changes})
