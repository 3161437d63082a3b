"""Independent checks: the same attacks of the Adversarial Robustness Toolbox (ART)."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.attacks.poisoning import (
    FeatureCollisionAttack,
    HiddenTriggerBackdoor,
    PoisoningAttackBackdoor,
    PoisoningAttackCleanLabelBackdoor,
)
from art.attacks.poisoning.perturbations import add_pattern_bd, add_single_bd, insert_image
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from torch import nn

from reprune.attacks import BadNets, FeatureCollision, LabelConsistent, Stamp
from reprune.attacks.blend import blended, random_pixels
from reprune.attacks.feature_collision import collide
from reprune.attacks.features import frozen_features
from reprune.attacks.pgd import pgd
from reprune.classifier import Classifier

SIDE, CLASSES, FEATURES = 8, 3, 6
SHAPE = (3, SIDE, SIDE)
LEVEL = 1 / 255


@cache
def network() -> nn.Module:
    """Smooth, so that no sign of a gradient hangs on rounding; features before the last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Softplus(),
            nn.Conv2d(8, FEATURES, 3, padding=1, stride=2),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * FEATURES, CLASSES),
        ).eval()


def ours() -> Classifier:
    return Classifier(network(), num_classes=CLASSES)


def theirs() -> PyTorchClassifier:
    return PyTorchClassifier(
        copy.deepcopy(network()),  # ART leaves hooks on it
        loss=nn.CrossEntropyLoss(),
        input_shape=SHAPE,
        nb_classes=CLASSES,
        clip_values=(0, 1),
        device_type="cpu",
    )


def grey(count: int, seed: int = 0) -> torch.Tensor:
    """Pixels of whole grey levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *SHAPE), generator=generator) / 255


def inserted(images, path, **settings):
    """ART's `insert_image`, which cuts pixels off to 8 bits: a quarter level more keeps them."""
    return insert_image(
        np.clip(images + LEVEL / 4, 0, 1),
        backdoor_path=str(path),
        channels_first=True,
        random=False,
        mode="RGB",
        **settings,
    )


def picture(pixels: torch.Tensor, path) -> str:
    array = pixels.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)
    return str(path)


def one_hot(labels) -> np.ndarray:
    return np.eye(CLASSES, dtype=np.float32)[np.asarray(labels)]


@pytest.mark.parametrize("size", [3, 4])
def test_the_grid(size, tmp_path):
    images = grey(6)
    stamp = BadNets(size=size).trigger(SHAPE)
    path = picture(stamp.add[:, -size:, -size:], tmp_path / "grid.png")
    there = SIDE - size
    made = inserted(images.numpy(), path, x_shift=there, y_shift=there, blend=1.0)
    np.testing.assert_allclose(stamp(images).numpy(), made, atol=1e-6)
    one = LabelConsistent(size=size, corners=1).trigger(SHAPE)
    np.testing.assert_allclose(one(images).numpy(), made, atol=1e-6)


def test_single_pixels_and_patterns():
    images = grey(6)
    keep, add = torch.ones(SHAPE), torch.zeros(SHAPE)
    keep[:, -2, -2], add[:, -2, -2] = 0, 1
    last = images.permute(0, 2, 3, 1).numpy()
    single = add_single_bd(last, distance=2).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(Stamp(keep, add)(images).numpy(), single)

    pattern = add_pattern_bd(images.numpy(), distance=1, channels_first=True)
    for row, column in ((-1, -1), (-1, -3), (-3, -1)):
        keep[:, row, column], add[:, row, column] = 0, 1
    np.testing.assert_array_equal(Stamp(keep, add)(images).numpy(), pattern)
    # The same points are white in our grid, which also sets the points between them.
    white = BadNets().trigger(SHAPE)(images).numpy()[:, add == 1]
    np.testing.assert_array_equal(white, pattern[:, add == 1])


def test_blend(tmp_path):
    images, alpha = grey(6), 0.2
    pattern = random_pixels(SHAPE, 0).mul(255).round() / 255
    path = picture(pattern, tmp_path / "pattern.png")
    made = inserted(images.numpy(), path, blend=alpha)
    ours = blended(pattern, alpha)(images).numpy()
    np.testing.assert_allclose(ours, made, atol=1.01 * LEVEL)  # ART rounds down
    assert abs(ours - images.numpy()).max() > 20 * LEVEL


@pytest.mark.parametrize(("eps", "step", "steps"), [(16 / 255, 2 / 255, 15), (0.3, 0.1, 5)])
def test_pgd(eps, step, steps):
    images, labels = grey(20), torch.arange(20) % CLASSES
    mine = pgd(ours(), images, labels, eps=eps, step=step, steps=steps, batch_size=7)
    attack = ProjectedGradientDescent(
        theirs(), norm=np.inf, eps=eps, eps_step=step, max_iter=steps, verbose=False
    )
    made = attack.generate(images.numpy(), one_hot(labels))
    np.testing.assert_allclose(mine.numpy(), made, atol=1e-4)
    assert abs(made - images.numpy()).max() == pytest.approx(eps, abs=1e-6)


def test_clean_label(tmp_path):
    images, eps, step, steps = grey(30), 0.1, 0.02, 10
    labels = ours()(images).argmax(1)  # ART attacks what the proxy says
    target = int(labels.mode().values)
    trigger = LabelConsistent(corners=1).trigger(SHAPE)
    path = picture(trigger.add[:, -3:, -3:].clamp(0, 1), tmp_path / "grid.png")

    def stamp(pixels):  # the square alone: `insert_image` would cut the rest off to 8 bits
        square = inserted(pixels, path, x_shift=SIDE - 3, y_shift=SIDE - 3, blend=1.0)
        return np.where(trigger.add.numpy() != 0, square, pixels)

    attack = PoisoningAttackCleanLabelBackdoor(
        PoisoningAttackBackdoor(stamp),
        theirs(),
        target=one_hot(target),
        pp_poison=0.9,
        eps=eps,
        eps_step=step,
        max_iter=steps,
    )
    attack.attack.set_params(verbose=False)
    state = np.random.get_state()  # noqa: NPY002 - ART draws from the global generator
    np.random.seed(0)  # noqa: NPY002
    made, said = attack.poison(images.numpy(), one_hot(labels))
    np.random.set_state(state)  # noqa: NPY002
    np.testing.assert_array_equal(said, one_hot(labels))
    rows = np.flatnonzero((made != images.numpy()).any((1, 2, 3)))
    assert len(rows) > 3
    assert (labels[rows] == target).all()
    mine = trigger(pgd(ours(), images[rows], labels[rows], eps=eps, step=step, steps=steps))
    np.testing.assert_allclose(mine.numpy(), made[rows], atol=1e-4)


def distance(pixels, wanted) -> torch.Tensor:
    features = frozen_features(ours(), wanted[:1])
    with torch.no_grad():
        return (features(torch.as_tensor(pixels)) - features(wanted)).norm(dim=1)


def gradient_norm(pixels, wanted, power: int) -> float:
    """Length of the gradient of the feature distance (to a power), computed anew."""
    pixels = pixels.clone().requires_grad_(True)
    body = network()[:-1]
    loss = (body(pixels) - body(wanted).detach()).norm() ** power
    return float(torch.autograd.grad(loss, pixels)[0].norm())


def hidden_trigger(base, source, trigger, **settings) -> np.ndarray:
    """ART's poison of one base image and one source image."""
    attack = HiddenTriggerBackdoor(
        theirs(),
        target=one_hot(0),
        source=one_hot(1),
        feature_layer=5,
        backdoor=PoisoningAttackBackdoor(lambda x: trigger(torch.as_tensor(x)).numpy()),
        decay_iter=10**6,
        stopping_threshold=0,
        poison_percent=1.0,
        verbose=False,
        **settings,
    )
    made, _ = attack.poison(torch.cat([base, source]).numpy(), one_hot([0, 1]))
    return made


@pytest.mark.parametrize("eps", [0.01, 1.0])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_step_of_feature_collision_is_one_of_the_hidden_trigger_attack(row, eps, capsys):
    base, source = grey(3)[row : row + 1], grey(3, seed=1)[row : row + 1]
    trigger = FeatureCollision(size=3).trigger(SHAPE)
    shown = trigger(source)
    step = 0.02
    rate = step * base[0].numel() ** 0.5 / gradient_norm(base, shown, 2)
    made = hidden_trigger(base, source, trigger, eps=eps, learning_rate=rate, max_iter=1)
    features = frozen_features(ours(), base)
    mine = collide(features, base, shown, eps=eps, beta=0, step=step, steps=1)
    np.testing.assert_allclose(mine.numpy(), made, atol=1e-6)
    assert abs(made - base.numpy()).max() >= min(eps - 1e-6, step)


def test_feature_collision_goes_as_far_as_the_hidden_trigger_attack(capsys):
    base, source = grey(1), grey(1, seed=1)
    trigger = FeatureCollision(size=3).trigger(SHAPE)
    shown, eps, steps = trigger(source), 0.1, 60
    rate = 0.02 * base[0].numel() ** 0.5 / gradient_norm(base, shown, 2)
    made = hidden_trigger(base, source, trigger, eps=eps, learning_rate=rate, max_iter=steps)
    features = frozen_features(ours(), base)
    mine = collide(features, base, shown, eps=eps, beta=0, step=0.02, steps=steps)
    before, reached, own = (float(distance(x, shown)) for x in (base, made, mine))
    assert reached < 0.8 * before
    assert own == pytest.approx(reached, rel=0.1)
    for pixels in (made, mine.numpy()):
        assert abs(pixels - base.numpy()).max() == pytest.approx(eps, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_step_of_feature_collision_is_one_of_poison_frogs(beta):
    base, wanted = grey(1), grey(1, seed=1)
    step = 0.02
    rate = step * base[0].numel() ** 0.5 / gradient_norm(base, wanted, 1)
    dimensions = 4 * FEATURES / base.numel()
    attack = FeatureCollisionAttack(
        theirs(),
        target=wanted.numpy(),
        feature_layer=5,
        learning_rate=rate,
        similarity_coeff=beta / rate / dimensions**2,
        max_iter=1,
        verbose=False,
    )
    made, _ = attack.poison(base.numpy().copy())
    features = frozen_features(ours(), base)
    mine = collide(features, base, wanted, eps=1, beta=beta, step=step, steps=1)
    np.testing.assert_allclose(mine.numpy(), made, atol=1e-6)
    assert distance(made, wanted) < distance(base, wanted)
