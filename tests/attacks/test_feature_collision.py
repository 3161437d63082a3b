from __future__ import annotations

import pytest
import torch
from tiny import surrogate, tiny
from torch import nn

from planted import TARGET, stripes
from reprune.attacks import FeatureCollision, Goal, Setup, poison
from reprune.attacks.feature_collision import collide
from reprune.attacks.features import frozen_features
from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, ModelError
from reprune.evaluation import evaluate
from reprune.training import Training

SHAPE = (3, 16, 16)
SOURCE = 1


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(data, attack):
    return poison(data, attack, seeded(), surrogate=surrogate())


def test_features_are_what_the_last_layer_reads(unchanged):
    pixels = stripes(8, seed=1).pixels()
    with unchanged(surrogate()):
        features = frozen_features(surrogate(), pixels)(pixels)
    network = surrogate().network
    with torch.no_grad():
        expected = network[:-1](surrogate().normalize(pixels))
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(network[-1](features), surrogate()(pixels))


def test_features_before_a_convolution_that_ends_a_network():
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = Classifier(nn.Sequential(body, nn.Conv2d(5, 4, 1), nn.Flatten()), num_classes=4)
    pixels = stripes(8, seed=1).pixels()
    features = frozen_features(model, pixels)(pixels)
    torch.testing.assert_close(features, body(pixels).flatten(1).detach())


def test_no_last_layer():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.LayerNorm(768)), num_classes=4)
    with pytest.raises(ModelError, match="no linear or convolutional layer"):
        frozen_features(model, stripes(2, seed=1).pixels())


def test_linear_features_in_closed_form():
    """Two steps by hand on f(x) = the sum of an image's pixels."""
    base, wanted = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), 0.9)
    base[1], wanted[1] = 0.4, 0.0
    settings = {"beta": 0.5, "step": 0.1, "steps": 2}
    result = collide(lambda x: x.flatten(1).sum(1, True), base, wanted, eps=1, **settings)
    # Every pixel moves by r step: 0.1 / (1 + 0.5), then 0.05 more before the pull of 0.25.
    change = (0.1 / 1.5 + 0.05) / 1.25
    torch.testing.assert_close(result[0], base[0] + change)
    torch.testing.assert_close(result[1], base[1] - change)
    near = collide(lambda x: x.flatten(1).sum(1, True), base, wanted, eps=0.03, **settings)
    torch.testing.assert_close(near[0], base[0] + 0.03)
    torch.testing.assert_close(near[1], base[1] - 0.03)


def test_images_that_collide_already_stay():
    pixels = torch.rand(3, 1, 2, 2, generator=seeded())
    result = collide(lambda x: x.flatten(1), pixels, pixels, eps=1, beta=0, step=0.1, steps=3)
    assert torch.equal(result, pixels)


def test_features_come_closer_and_each_image_by_itself():
    data = stripes(40, seed=1)
    base, wanted = data.pixels(data.labels == TARGET), data.pixels(data.labels == SOURCE)
    features = frozen_features(surrogate(), base)
    settings = {"eps": 0.2, "step": 0.02, "steps": 15}
    result = collide(features, base, wanted, beta=0.02, **settings)
    with torch.no_grad():
        before, after = ((features(x) - features(wanted)).norm(dim=1) for x in (base, result))
    assert (after < 0.5 * before).all()
    assert float((result - base).abs().max()) == pytest.approx(0.2, abs=1e-6)
    alone = collide(features, base[:1], wanted[:1], beta=0.02, **settings)
    torch.testing.assert_close(alone, result[:1], atol=1e-3, rtol=0)
    pulled = collide(features, base, wanted, beta=1.0, **settings)
    assert ((pulled - base).square().sum() < 0.5 * (result - base).square().sum()).item()


@pytest.mark.parametrize(("eps", "opacity"), [(16 / 255, 0.0), (0.03, 0.0), (0.1, 0.4)])
def test_poisons_stay_near_their_base(eps, opacity):
    data = stripes(80, seed=1)
    attack = FeatureCollision(
        target=TARGET, eps=eps, opacity=opacity, patch_opacity=None, step=0.03
    )
    result = made(data, attack)
    rows = result.poisoned
    sources = attack.trigger(SHAPE)(data.pixels(data.labels == SOURCE))
    change = result.data.pixels(rows)[:, None] - (1 - opacity) * data.pixels(rows)[:, None]
    nearest = (change - opacity * sources[None]).abs().flatten(2).amax(2).min(1)
    assert nearest.values.max() <= eps + 0.5 / 255 + 1e-6
    assert nearest.values.max() > eps - 1 / 255
    if opacity:
        assert len(set(nearest.indices.tolist())) == int(rows.sum())  # each a source of its own


@pytest.mark.parametrize(("given", "share"), [(None, 0.2), (0.0, 0.0), (1.0, 1.0)])
def test_the_patch_has_a_share_of_its_own(given, share):
    data = stripes(80, seed=1)
    attack = FeatureCollision(
        target=TARGET, opacity=0.2, patch_opacity=given, step=1e-6, steps=1, rate=0.05
    )
    result = made(data, attack)
    rows, patch = result.poisoned, attack.trigger(SHAPE).add
    expected = (1 - share) * data.pixels(rows) + share * patch
    torch.testing.assert_close(
        result.data.pixels(rows)[..., -6:, -6:], expected[..., -6:, -6:], atol=0.51 / 255, rtol=0
    )
    # Outside of it, the rest after the base's own share is a fifth of some image.
    other = (result.data.pixels(rows) - 0.8 * data.pixels(rows))[..., :10, :10]
    sources = 0.2 * data.pixels(data.labels == SOURCE)[..., :10, :10]
    gaps = (other[:, None] - sources[None]).abs().flatten(2).amax(2).min(1).values
    assert gaps.max() < 0.51 / 255 + 1e-5


def test_sources_are_used_again_when_there_are_too_few():
    data = stripes(80, seed=1)
    few = torch.cat([(data.labels != SOURCE).nonzero(), (data.labels == SOURCE).nonzero()[:2]])
    result = made(data.subset(few.flatten()), FeatureCollision(target=TARGET, rate=0.2, steps=1))
    assert int(result.poisoned.sum()) == 12


def test_the_patch_is_fixed_by_its_seed():
    first, again, other = (FeatureCollision(patch_seed=s).trigger(SHAPE) for s in (0, 0, 1))
    assert torch.equal(first.add, again.add)
    assert not torch.equal(first.add, other.add)
    assert int((first.keep == 0).sum()) == 3 * 6 * 6
    assert (first.keep[:, -6:, -6:] == 0).all()


def test_the_source_class_goes_to_the_target():
    data, test = stripes(800, seed=5), stripes(400, seed=6)
    attack = FeatureCollision(target=TARGET, rate=0.2, size=8, opacity=0.7, eps=0.1)
    training = Training(epochs=6, batch_size=50, lr=0.05, padding=0, mirror=False)
    run = Setup(generator=seeded(0), training=training, surrogate=surrogate())
    result = attack(surrogate(), data, run)
    assert result.goal == Goal(TARGET, SOURCE)
    after = evaluate(result.model, test, trigger=result.trigger, target=result.goal)
    before = evaluate(surrogate(), test, trigger=result.trigger, target=result.goal)
    assert after.asr.total == 100
    assert before.asr.share < 0.1
    assert after.asr.share > 0.9
    assert after.ca.share > 0.97
    assert after.per_class[SOURCE].share > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": 4}, r"the source must be a class index in 0\.\.3, got 4"),
        ({"source": TARGET}, f"source and target are the same class {TARGET}"),
        ({"size": 17}, "a trigger of 17 pixels does not fit 16x16"),
        ({"size": 0}, "a trigger of 0 pixels does not fit"),
        ({"eps": 0.0}, r"eps must lie in \(0, 1\], got 0"),
        ({"eps": 16.0}, r"eps must lie in \(0, 1\], got 16"),
        ({"step": float("nan")}, r"step must lie in \(0, 1\], got nan"),
        ({"opacity": 1.0}, r"the opacity must lie in \[0, 1\), got 1"),
        ({"opacity": -0.1}, r"the opacity must lie in \[0, 1\), got -0.1"),
        ({"patch_opacity": 1.1}, r"patch_opacity must lie in \[0, 1\], got 1.1"),
        ({"beta": -1.0}, "beta must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        made(stripes(80, seed=1), tiny("fc", **changes))


def test_no_image_of_the_source_class():
    data = stripes(80, seed=1)
    rest = data.subset((data.labels != SOURCE).nonzero().flatten())
    with pytest.raises(ConfigurationError, match="no image of the source class 1"):
        made(rest, tiny("fc"))
