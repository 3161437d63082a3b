"""`Classifier`: preprocessing, copies that are independent, modes that come back."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, ModelError


def linear(**options: object) -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), num_classes=4, **options)


IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_logits_are_those_of_the_network_on_normalised_images():
    model = linear(mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))
    by_hand = torch.stack(
        [(IMAGES[:, i] - m) / s for i, (m, s) in enumerate([(0.1, 0.5), (0.2, 1), (0.3, 2)])], 1
    )
    assert torch.allclose(model(IMAGES), model.network(by_hand), atol=1e-6)
    assert torch.equal(model(IMAGES), model.network(model.normalize(IMAGES)))


@pytest.mark.parametrize("options", [{}, {"mean": (0, 0, 0), "std": (1, 1, 1)}])
def test_pixels_pass_where_nothing_is_to_normalise_and_are_not_changed(options):
    """Networks may work in place."""
    network = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(12, 4))
    pixels = (IMAGES - 0.5).requires_grad_()
    before = pixels.detach().clone()
    model = Classifier(network, num_classes=4, **options)
    assert torch.equal(model.normalize(pixels), before)
    model(pixels).sum().backward()
    assert torch.equal(pixels, before)


def test_one_statistic_serves_all_channels_and_integers_work():
    assert torch.equal(linear(mean=[1], std=[2]).normalize(IMAGES), (IMAGES - 1) / 2)
    assert linear(mean=[1], std=[2]).normalize(IMAGES).dtype == torch.float32


def test_statistics_follow_the_model_but_are_no_weights():
    model = linear(mean=(0.5,), std=(0.25,))
    assert model.state_dict().keys() == {"network.1.weight", "network.1.bias"}
    assert model.to("meta").mean.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "a classifier needs at least 2 classes, got 1"),
        ({"std": (0.5, 0.0, 1)}, r"std must be positive in every channel, got \[0.5, 0.0, 1\]"),
        ({"mean": (0.5,), "std": (float("nan"),)}, r"std must be positive .* \[nan\]"),
        ({"mean": (0.5, 0.5), "std": (1.0,)}, "mean and std need the same length, got 2 and 1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Classifier(nn.Identity(), **{"num_classes": 3} | options)


def test_a_clone_is_equal_trainable_and_independent():
    model = linear(mean=(0.5,), std=(0.25,)).eval().requires_grad_(False)
    model.network[1].train()
    twin = model.clone()
    assert torch.equal(twin(IMAGES), model(IMAGES))
    assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        twin.network[1].weight.zero_()
        twin.mean.zero_()
    assert model.network[1].weight.abs().min() > 0
    assert model.mean.item() == 0.5


def test_a_clone_leaves_integer_parameters_alone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    network.table = nn.Parameter(torch.arange(3), requires_grad=False)
    twin = Classifier(network, num_classes=4).clone()
    assert twin.network[1].weight.requires_grad
    assert not twin.network.table.requires_grad


def test_a_weight_that_a_hook_computes_is_cloned_as_a_value():
    model = Classifier(
        nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(12, 4))), num_classes=4
    )
    model.eval()
    expected = model(IMAGES)  # leaves a weight with a graph behind
    assert not model.network[1].weight.is_leaf
    twin = model.clone()
    assert torch.equal(twin(IMAGES), expected)
    twin(IMAGES).sum().backward()
    assert twin.network[1].weight_orig.grad is not None
    assert model.network[1].weight_orig.grad is None


class Holding(nn.Module):
    def __init__(self, thing: object) -> None:
        super().__init__()
        self.thing = thing

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (threading.Lock(), "cannot be copied: cannot pickle"),
        ([torch.ones(2, requires_grad=True) * 2], "cannot be copied: Only Tensors created"),
    ],
)
def test_networks_that_cannot_be_copied(thing, message):
    with pytest.raises(ModelError, match=message):
        Classifier(Holding(thing), num_classes=2).clone()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_every_module_gets_its_own_mode_back(error):
    model = Classifier(nn.Sequential(nn.Dropout(), nn.Sequential(nn.ReLU())), num_classes=2)
    model.train()
    model.network[1].eval()
    before = [m.training for m in model.modules()]
    assert len(set(before)) == 2
    try:
        with model.evaluating() as inside:
            assert inside is model
            assert not any(m.training for m in model.modules())
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert [m.training for m in model.modules()] == before
