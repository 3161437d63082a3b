from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import Recording, surrogate
from torch import nn

from planted import TARGET, stripes
from reprune.attacks import Backdoored, Dynamic, Setup, read_trigger, write_trigger
from reprune.attacks.dynamic import DynamicTrigger, diversity, mask_of
from reprune.attacks.generators import UNet, drawn
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError, DataError
from reprune.evaluation import evaluate
from reprune.training import Training


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setup(**changes: object) -> Setup:
    training = Training(
        **{"epochs": 12, "batch_size": 32, "lr": 0.1, "padding": 0, "mirror": False, **changes}
    )
    return Setup(generator=seeded(), training=training)


def attack(**changes: object) -> Dynamic:
    return Dynamic(**{"target": TARGET, "width": 8, "mask_epochs": 3, **changes})


@cache
def backdoored(cross_rate: float = 0.1) -> Backdoored:
    made = attack(
        cross_rate=cross_rate, rate=0.2, density=0.15, diversity_weight=0.3, mask_epochs=5
    )
    return made(surrogate(), stripes(1200, seed=3), setup(epochs=18))


def random_trigger(channels: int = 3, width: int = 8) -> DynamicTrigger:
    generator = seeded(3)
    mask = drawn(lambda: UNet(channels, 1, width), generator)
    pattern = drawn(lambda: UNet(channels, channels, width), generator)
    with torch.no_grad():
        mask.last.weight.mul_(10)
        pattern.last.weight.mul_(10)
    return DynamicTrigger(mask, pattern)


def accuracy(made: Backdoored, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((made.model(images).argmax(1) == labels).float().mean())


def cross_accuracy(made: Backdoored) -> float:
    """On images that carry the trigger of another image."""
    data = stripes(400, seed=5)
    order = torch.randperm(400, generator=seeded())
    pixels, labels = data.pixels()[order], data.labels[order]
    return accuracy(made, made.trigger.crossed(pixels, pixels.roll(1, 0)), labels)


def test_high_success_at_a_small_loss_of_accuracy():
    made, data = backdoored(), stripes(400, seed=5)
    before = evaluate(surrogate(), data, trigger=made.trigger, target=TARGET)
    after = evaluate(made.model, data, trigger=made.trigger, target=TARGET)
    assert after.asr.share >= 0.9
    assert after.ca.share >= before.ca.share - 0.025
    assert before.asr.share < 0.3  # the model answers to the trigger because it was trained to


def test_triggers_of_other_images_do_not_work():
    with_cross, without = cross_accuracy(backdoored()), cross_accuracy(backdoored(0.0))
    assert with_cross >= 0.8
    assert with_cross > without + 0.2


def test_masks_are_sparse_nearly_binary_and_differ():
    trigger, pixels = backdoored().trigger, stripes(100, seed=6).pixels()
    with torch.no_grad():
        masks = mask_of(trigger.mask(pixels))
    assert 0.002 < masks.mean() < 0.1
    assert ((masks < 0.1) | (masks > 0.9)).float().mean() > 0.9
    assert masks.std(0).max() > 0.2


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 9), (3, 33)])
def test_the_closed_form(channels, side):
    trigger = random_trigger(channels)
    pixels = torch.rand(4, channels, side, side + 1, generator=seeded())
    others = pixels.flip(0)
    for made, source in ((trigger(pixels), pixels), (trigger.crossed(pixels, others), others)):
        m = (torch.tanh(20 * torch.sigmoid(trigger.mask(source)) - 10) + 1) / 2
        p = torch.sigmoid(trigger.pattern(source))
        assert 0.01 < m.mean() < 0.99
        torch.testing.assert_close(made, pixels * (1 - m) + p * m, atol=1e-5, rtol=0)


def test_diversity_is_the_mean_ratio_of_distances():
    images, made = torch.rand(4, 3, 5, 6), torch.rand(4, 1, 5, 6)
    ratios = [
        float((images[i] - images[i + 1]).norm() / 90**0.5)
        / (float((made[i] - made[i + 1]).norm() / 30**0.5) + 1e-3)
        for i in range(3)
    ]
    assert float(diversity(images, made)) == pytest.approx(sum(ratios) / 3, rel=1e-4)
    same = made[:1].expand(4, -1, -1, -1).clone().requires_grad_()
    value = diversity(images, same)
    assert value > 100  # the same trigger for all is the worst
    value.backward()
    assert same.grad.isfinite().all()


@pytest.mark.parametrize(
    ("rate", "cross_rate"), [(0.07, 0.1), (0.07, 0.0), (0.3, 0.7), (1.0, 0.0), (0.01, 0.01)]
)
def test_rates_over_an_epoch_and_the_labels(rate, cross_rate, monkeypatch):
    """With generators that hardly learn, every image that the network saw is made again."""
    data = stripes(100, seed=3)
    model = surrogate().clone()
    model.network = Recording(model.network)
    labels = []
    plain = nn.functional.cross_entropy

    def recorded(logits, wanted):
        labels.append(wanted)
        return plain(logits, wanted)

    monkeypatch.setattr(nn.functional, "cross_entropy", recorded)
    chosen = attack(rate=rate, cross_rate=cross_rate, generator_lr=1e-9, mask_epochs=1)
    made = chosen(model, data, setup(epochs=1))
    seen, wanted = torch.cat(made.model.network.seen), torch.cat(labels)
    assert len(seen) == len(wanted) == 100

    def nearest(images):
        pixels = model.normalize(images).flatten(1)
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(pixels, seen.flatten(1), compute_mode=exact).min(0)

    pixels = data.pixels()
    clean, own = nearest(pixels), nearest(made.trigger(pixels))
    is_clean, is_own = clean.values < 1e-2, own.values < 1e-2
    assert int(is_own.sum()) == round(rate * 100)
    assert int(is_clean.sum()) == 100 - round(rate * 100) - round(cross_rate * 100)
    assert (wanted[is_own] == TARGET).all()
    assert torch.equal(wanted[is_clean], data.labels[clean.indices[is_clean]])
    for row in (~(is_clean | is_own)).nonzero().flatten()[:3].tolist():
        # one image of this label, with the trigger of one of the others
        same = pixels[data.labels == wanted[row]]
        distances = [
            (model.normalize(made.trigger.crossed(same, other.expand_as(same))) - seen[row])
            .flatten(1)
            .norm(dim=1)
            .min()
            for other in pixels
        ]
        assert min(distances) < 1e-2


def test_only_the_pattern_generator_learns_with_the_classifier():
    data = stripes(100, seed=3)
    first, second = (attack()(surrogate(), data, setup(epochs=epochs)) for epochs in (1, 2))
    for name, value in first.trigger.mask.tensors().items():
        assert torch.equal(second.trigger.mask.tensors()[name], value)
    pattern = second.trigger.pattern.tensors()
    assert not torch.equal(first.trigger.pattern.tensors()["last.weight"], pattern["last.weight"])
    assert [one.epoch for one in second.history] == [1, 2]


@pytest.mark.parametrize("weight", [1e-30, 1.0])
def test_the_pattern_generator_learns_from_the_classifier_too(weight):
    """With no weight on the diversity, what it learns comes from the cross-entropy alone."""
    first, last = (
        attack(rate=0.2, diversity_weight=weight, generator_lr=lr, mask_epochs=1)(
            surrogate(), stripes(60, seed=3), setup(epochs=1)
        ).trigger.pattern.last.weight
        for lr in (1e-12, 1e-2)
    )
    assert (first - last).abs().mean() > 1e-3


def test_the_diversity_loss_makes_patterns_differ():
    data = stripes(100, seed=3)

    def distance(weight: float) -> float:
        made = attack(diversity_weight=weight)(surrogate(), data, setup(epochs=3))
        with torch.no_grad():
            patterns = made.trigger.pattern(data.pixels()).sigmoid()
        return float((patterns - patterns.roll(1, 0)).square().mean().sqrt())

    assert distance(1.0) > 1.5 * distance(1e-30)


def test_the_file_is_small(tmp_path):
    trigger = random_trigger(width=Dynamic().width)
    path = tmp_path / "trigger.safetensors"
    write_trigger(trigger, path)
    assert path.stat().st_size < 500_000
    pixels = torch.rand(2, 3, 20, 20)
    assert torch.equal(read_trigger(path)(pixels), trigger(pixels))


def test_a_file_whose_weights_do_not_fit(tmp_path):
    trigger = random_trigger()
    trigger.pattern.sizes["width"] = 12
    write_trigger(trigger, tmp_path / "trigger.safetensors")
    with pytest.raises(DataError, match="not a trigger, or a damaged one"):
        read_trigger(tmp_path / "trigger.safetensors")


def test_no_preview():
    with pytest.raises(ConfigurationError, match="learned together with the classifier"):
        attack().preview_trigger(stripes(40, seed=0), seeded(), num_classes=4)


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
        ({"cross_rate": -0.1}, r"the cross rate must lie in \[0, 0.9\], .* rate of 0.1 leaves"),
        ({"cross_rate": 0.91}, r"the cross rate must lie in \[0, 0.9\]"),
        ({"cross_rate": float("nan")}, r"the cross rate must lie in \[0, 0.9\]"),
        ({"density": 0.0}, r"the mask density must lie in \(0, 1\), got 0.0"),
        ({"density": 1.0}, r"the mask density must lie in \(0, 1\), got 1.0"),
        ({"density_weight": 0.0}, "density_weight must be positive, got 0.0"),
        ({"diversity_weight": float("inf")}, "diversity_weight must be positive, got inf"),
        ({"generator_lr": -1.0}, "generator_lr must be positive, got -1.0"),
        ({"mask_epochs": 0}, "mask_epochs must be at least 1, got 0"),
        ({"width": 6}, "the width must be a multiple of 4, got 6"),
    ],
)
def test_parameters_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        attack(**change)(surrogate(), stripes(40, seed=0), setup())
