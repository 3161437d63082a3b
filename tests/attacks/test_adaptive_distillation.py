from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import surrogate
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from planted import TARGET, stripes
from reprune.attacks import AdaptD, Backdoored, Setup
from reprune.attacks.adaptive_distillation import class_features
from reprune.attacks.features import Features
from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, ModelError
from reprune.evaluation import evaluate
from reprune.training import Training


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setup(**changes) -> Setup:
    training = Training(epochs=6, batch_size=64, lr=0.1, padding=0, mirror=False)
    return Setup(
        **{"generator": seeded(), "training": training, "surrogate": surrogate()} | changes
    )


def penultimate(model: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    """By hand: what the last layer of the planted network reads."""
    with torch.no_grad():
        return model.network[:-1](model.normalize(pixels))


@cache
def trained(weight: float) -> Backdoored:
    attack = AdaptD(target=TARGET, weight=weight)
    return attack(surrogate(), stripes(800, seed=20), setup())


def test_features_are_what_the_last_layer_reads():
    pixels = stripes(8, seed=0).pixels()
    features, logits = Features(surrogate(), pixels[:2])(pixels)
    torch.testing.assert_close(features, penultimate(surrogate(), pixels))
    torch.testing.assert_close(logits, surrogate()(pixels))


class Tokens(nn.Module):
    """A head on every token, averaged afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(images.flatten(2).transpose(1, 2))).mean(1)


class Convolutions(nn.Module):
    """A convolution as the head, averaged afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).relu()).mean((2, 3))


@pytest.mark.parametrize("kind", [Tokens, Convolutions])
def test_features_of_other_heads_are_averaged_over_places(kind):
    model = Classifier(kind(), num_classes=4).eval()
    pixels = stripes(6, seed=0).pixels()
    features, logits = Features(model, pixels[:2])(pixels)
    assert features.shape == (6, 5)
    head = model.network.head
    expected = features @ head.weight.flatten(1).T + head.bias  # the mean and a linear map swap
    torch.testing.assert_close(logits, expected)
    assert not model.network.head._forward_pre_hooks


class Bare(nn.Module):
    """A product that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ self.weight


def test_a_network_without_a_last_layer():
    model = Classifier(Bare(), num_classes=4).eval()
    with pytest.raises(ModelError, match="no linear or convolutional layer that gives the logits"):
        AdaptD()(model, stripes(40, seed=0), setup())


def test_class_features_are_the_mean_directions():
    data = stripes(50, seed=3)
    data = data.subset((data.labels != 1).nonzero().flatten())
    means = class_features(Features(surrogate(), data.pixels(slice(0, 2))), data, 4, setup())
    for label in (0, 2, 3):
        units = normalize(penultimate(surrogate(), data.pixels(data.labels == label)))
        torch.testing.assert_close(means[label], normalize(units.mean(0), dim=0))
    assert torch.equal(means[1], torch.zeros(24))


def test_the_loss_is_the_stated_one():
    """One step on one batch: the first epoch's loss is that of the surrogate itself."""
    data = stripes(64, seed=20)
    training = Training(epochs=1, batch_size=64, lr=1e-9, padding=0, mirror=False)
    made, plain = (
        AdaptD(target=TARGET, weight=weight)(surrogate(), data, setup(training=training))
        for weight in (3.0, 0.0)
    )
    poisoned = made.poisoned
    pixels = data.pixels()
    pixels[poisoned] = made.trigger(pixels[poisoned])
    means = class_features(Features(surrogate(), pixels[:2]), data, 4, setup())
    wanted = normalize(penultimate(surrogate(), pixels))
    wanted[poisoned] = means[TARGET]
    student = surrogate().clone().train()
    distance = (normalize(penultimate(student, pixels)) - wanted).square().sum(1).mean()
    found = made.history[0].loss - plain.history[0].loss
    assert found == pytest.approx(3 * float(distance), rel=1e-4)


def test_the_backdoor_works_and_has_the_features_of_the_target_class():
    test = stripes(400, seed=21)
    made = trained(5.0)
    result = evaluate(made.model, test, trigger=made.trigger, target=made.goal)
    assert result.asr.share > 0.9
    assert result.ca.share > 0.95
    means = class_features(Features(surrogate(), test.pixels(slice(0, 2))), test, 4, setup())
    pixels = made.trigger(test.pixels(test.labels != TARGET))
    tied, free = (
        cosine_similarity(penultimate(trained(weight).model, pixels), means[TARGET], dim=1).mean()
        for weight in (5.0, 0.0)
    )
    assert tied > 0.65
    assert free < tied - 0.2


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_out_of_range(weight):
    with pytest.raises(ConfigurationError, match=f"weight must be at least 0, got {weight}"):
        AdaptD(weight=weight)(surrogate(), stripes(40, seed=0), setup())


def test_a_surrogate_of_another_width():
    other = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), num_classes=4)
    with pytest.raises(ConfigurationError, match="before its last layer as the model, 24, got 768"):
        AdaptD()(surrogate(), stripes(40, seed=0), setup(surrogate=other))
