"""How far each class can be ahead of all others, by hand on linear models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection import Margins, MarginSearch, largest_margins
from reprune.errors import ConfigurationError


def linear(weights: torch.Tensor) -> Classifier:
    """Logits are sums over the pixels, one weight a class and pixel."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(weights.shape[1], len(weights), bias=False))
    network[1].weight.data = weights
    return Classifier(network, num_classes=len(weights))


@pytest.fixture
def data() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(20) % 4)


@pytest.mark.parametrize("chunk", [480, 7])
def test_the_largest_margin_of_a_linear_model_is_known(data, chunk):
    """Class k wants the pixels of its own quarter bright: 4 pixels times its weight."""
    strengths = (1.0, 2.0, 5.0, 1.5)
    weights = torch.zeros(4, 16)
    for k, strength in enumerate(strengths):
        weights[k, 4 * k : 4 * k + 4] = strength
    found = largest_margins(
        linear(weights),
        data,
        MarginSearch(steps=120, chunk=chunk),
        generator=torch.Generator().manual_seed(1),
    )
    for values in (found.noise, found.images):
        assert values == pytest.approx([4 * s for s in strengths], rel=0.02)
    label, ratio = found.leader()
    assert (label, round(ratio, 1)) == (2, 2.5)


def test_the_same_seed_gives_the_same_margins_and_the_model_stays(data, unchanged):
    model = linear(torch.randn(4, 16, generator=torch.Generator().manual_seed(3)))
    with unchanged(model):
        first, second = (
            largest_margins(
                model, data, MarginSearch(steps=5), generator=torch.Generator().manual_seed(2)
            )
            for _ in range(2)
        )
    assert first == second


@pytest.mark.parametrize(
    ("noise", "images", "leader"),
    [
        ((1.0, 2.0, 4.0), (1.0, 2.0, 6.0), (2, 2.0)),  # the smaller ratio
        ((1.0, 9.0, 4.0), (1.0, 2.0, 6.0), None),  # they disagree
        ((-3.0, -2.0, -1.0), (1.0, 2.0, 6.0), None),
        ((1.0, -2.0, -1.0), (1.0, -2.0, -6.0), (0, 20.0)),
    ],
)
def test_both_kinds_of_starts_name_the_leader(noise, images, leader):
    assert Margins(noise, images).leader() == leader


def test_margins_that_broke_are_not_usable():
    assert Margins((1.0, 2.0), (1.0, 2.0)).usable
    assert not Margins((1.0, math.nan), (1.0, 2.0)).usable


@pytest.mark.parametrize("field", ["steps", "starts", "chunk", "lr"])
def test_settings_that_cannot_work(field):
    with pytest.raises(ConfigurationError, match=field):
        MarginSearch(**{field: 0}).check()


def test_of_two_searches_the_larger_margins_count():
    first, second = Margins((1.0, 4.0), (2.0, 2.0)), Margins((3.0, 3.5), (1.0, 5.0))
    assert first.furthest(second) == Margins((3.0, 4.0), (2.0, 5.0))
