"""Fine-tuning, plain and with sharpness-aware minimisation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import planted
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.defenses.finetuning import (
    FineTune,
    SharpnessAware,
    perturbations,
    sharpness_aware,
)
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.masks import ChannelMask
from reprune.rnp import FineTuning, finetune, tune
from reprune.training import Batch, classification


def batch_of(data: ImageSet) -> Batch:
    index = torch.arange(len(data))
    return Batch(data.pixels(), data.labels, index, 0, 0, torch.Generator())


def linear(classes: int = 3) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(432, classes)), num_classes=classes)


def softmax_gradient(images, labels, weight, bias):
    """Of the mean cross-entropy of a linear model, in closed form: ((p - y)^T x, sum of p - y)."""
    flat = images.flatten(1)
    residual = (flat @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels, len(bias))
    return residual.T @ flat / len(flat), residual.mean(0)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_step_is_the_gradient_at_the_worst_point_nearby(toy_data, adaptive):
    model, rho = linear(), 0.7
    layer = model.network[1]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    images, labels = toy_data.pixels(), toy_data.labels
    at = softmax_gradient(images, labels, weight, bias)
    scales = [p.abs() if adaptive else torch.ones_like(p) for p in (weight, bias)]
    norm = sum(((t * g) ** 2).sum() for t, g in zip(scales, at, strict=True)).sqrt()
    moved = [p + rho * t**2 * g / norm for p, t, g in zip((weight, bias), scales, at, strict=True)]
    wanted = softmax_gradient(images, labels, *moved)
    value, right = sharpness_aware(model, SharpnessAware(rho=rho, adaptive=adaptive))(
        batch_of(toy_data)
    )
    value.backward()
    torch.testing.assert_close(layer.weight.grad, wanted[0])
    torch.testing.assert_close(layer.bias.grad, wanted[1])
    assert torch.equal(layer.weight, weight)
    assert int(right) == int(((images.flatten(1) @ weight.T + bias).argmax(1) == labels).sum())


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_perturbation_lies_on_the_sphere(adaptive):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.ones(2))]
    gradients = (torch.randn(4, 3, generator=generator), None)
    steps = perturbations(weights, gradients, SharpnessAware(rho=0.5, adaptive=adaptive))
    scale = weights[0].detach().abs() if adaptive else 1.0
    assert (steps[0] / scale).norm() == pytest.approx(0.5, rel=1e-5)
    assert (steps[1] == 0).all()


def test_a_gradient_of_zero_perturbs_nothing():
    weight = nn.Parameter(torch.ones(3))
    (step,) = perturbations([weight], (torch.zeros(3),), SharpnessAware())
    assert (step == 0).all()


def test_only_the_first_pass_moves_the_statistics(toy_model, toy_data):
    once, twice = copy.deepcopy(toy_model).train(), copy.deepcopy(toy_model).train()
    once(toy_data.pixels())
    sharpness_aware(twice, SharpnessAware())(batch_of(toy_data))
    buffers = dict(twice.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in once.named_buffers())


class Twice(nn.Module):
    """One layer under two names, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(432, 432)
        self.again = self.first
        self.tied = nn.Linear(432, 432)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(432, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tied(self.again(self.first(x.flatten(1)))))


def test_shared_weights_are_perturbed_once_and_stay_in_place(toy_data):
    model = Classifier(Twice(), num_classes=3)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    value, _ = sharpness_aware(model, SharpnessAware(rho=0.1))(batch_of(toy_data))
    value.backward()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_plain_fine_tuning_is_that_of_the_pruned_model_without_a_mask(toy_model, toy_data):
    settings = FineTuning(epochs=2, batch_size=16)
    wanted, history = finetune(
        toy_model,
        ChannelMask({}),
        toy_data,
        settings,
        augmentation=Augmentation(4, True),
        generator=torch.Generator().manual_seed(0),
        progress=lambda *_, **__: None,
    )
    result = FineTune(finetuning=settings)(
        toy_model, toy_data, generator=torch.Generator().manual_seed(0)
    )
    assert result.trace.phases["fine-tune"] == history
    state = result.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in wanted.state_dict().items())


def test_a_vanishing_radius_is_plain_fine_tuning(toy_model, toy_data):
    settings = FineTuning(epochs=1, batch_size=30)
    plain, sam = (
        FineTune(finetuning=settings, sam=sam)(
            toy_model, toy_data, generator=torch.Generator().manual_seed(0)
        )
        for sam in (None, SharpnessAware(rho=1e-9))
    )
    state = sam.model.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


def test_tuning_leaves_the_model_and_gives_one_in_evaluation_mode(toy_model, toy_data, unchanged):
    with unchanged(toy_model):
        tuned, history = tune(
            toy_model,
            toy_data,
            lambda working: sharpness_aware(working, SharpnessAware(rho=0.5)),
            FineTuning(epochs=2, batch_size=45),
            phase="fine-tune",
            augmentation=Augmentation(0, False),
            generator=torch.Generator().manual_seed(0),
            progress=lambda *_, **__: None,
        )
    assert len(history) == 2
    assert not any(module.training for module in tuned.modules())


def test_a_mask_of_infinite_numbers_is_no_divergence(toy_model, toy_data):
    network = copy.deepcopy(toy_model.network)
    network.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    network.get_extra_state = lambda: "something"
    network.set_extra_state = lambda state: None
    model = Classifier(network, num_classes=3)
    tuned, _ = tune(
        model,
        toy_data,
        classification,
        FineTuning(epochs=1, batch_size=45),
        phase="fine-tune",
        augmentation=Augmentation(0, False),
        generator=torch.Generator().manual_seed(0),
        progress=lambda *_, **__: None,
    )
    assert torch.equal(tuned.network.mask, network.mask)


@pytest.mark.parametrize("defense", [FineTune(), FineTune.sharpness_aware()])
def test_a_planted_backdoor_weakens_and_accuracy_holds(defense):
    model, test = planted.model(True), planted.stripes(400, seed=12)
    defense = replace(
        defense, finetuning=replace(defense.finetuning, lr=0.05, epochs=20, batch_size=32)
    )
    result = defense(
        model, planted.stripes(200, seed=11), generator=torch.Generator().manual_seed(0)
    )
    before, after = (
        evaluate(each, test, trigger=planted.trigger(), target=planted.TARGET)
        for each in (model, result.model)
    )
    assert after.asr.share < before.asr.share - 0.2
    assert after.ca.share > before.ca.share - 0.05


def test_the_published_settings():
    tuning = FineTuning(lr=0.01, epochs=100, batch_size=256)
    assert FineTune.paper() == FineTune(finetuning=tuning)
    published = FineTune(finetuning=tuning, sam=SharpnessAware(rho=2.0, adaptive=True))
    assert FineTune.sharpness_aware_paper() == published


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_a_radius_that_is_not_positive_is_refused(rho):
    with pytest.raises(ConfigurationError, match=f"rho must be positive, got {rho}"):
        FineTune(sam=SharpnessAware(rho=rho)).check()
    with pytest.raises(ConfigurationError, match="must be positive"):
        FineTune(finetuning=FineTuning(lr=0)).check()
