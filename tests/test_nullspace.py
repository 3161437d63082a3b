"""What clean images leave free, against direct computation; an optimiser that keeps to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import planted
from reprune.classifier import Classifier
from reprune.nullspace import WIDEST, NullSpaceSGD, free_directions


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _projected(inputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """The definition, by the eigenvectors."""
    moment = inputs.double().T @ inputs.double()
    values, vectors = torch.linalg.eigh(moment)
    rho = ridge * values.mean()
    return (vectors * (rho / (values + rho))) @ vectors.T


def test_a_linear_layer_by_its_eigenvectors() -> None:
    images = torch.rand(90, 1, 3, 4, generator=generator())
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), num_classes=3)
    free = free_directions(model, images, ridge=0.05)
    assert list(free) == ["network.1.weight"]
    expected = _projected(images.flatten(1), 0.05)
    assert torch.allclose(free["network.1.weight"].double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "bias": False},
        {"kernel_size": (3, 2), "dilation": (1, 2), "padding": "same"},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    ],
)
def test_a_convolution_is_a_product_with_these_inputs(options) -> None:
    """A weight that lies wholly in one input direction tells how that direction is used."""
    conv = nn.Conv2d(2, 1, **options)
    model = Classifier(nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(2)), num_classes=2)
    images = torch.rand(8, 2, 6, 7, generator=generator())
    model(images)
    free = free_directions(model, images, ridge=0.1)["network.0.weight"]
    size = conv.weight[0].numel()
    responses = []
    with torch.no_grad():
        conv.bias = None
        for i in range(size):
            conv.weight.copy_(torch.eye(size)[i].view_as(conv.weight))
            responses.append(conv(images).flatten())
    assert torch.allclose(free.double(), _projected(torch.stack(responses, 1), 0.1), atol=1e-5)


def test_a_step_hardly_moves_the_answers_to_clean_images() -> None:
    """Images use half of the inputs; what a step changes there is a small share of the step."""
    used = torch.rand(60, 4, generator=generator())
    images = torch.cat([used, torch.zeros(60, 4)], 1).view(60, 1, 2, 4)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False)), num_classes=3)
    free = free_directions(model, images, ridge=1e-3)["network.1.weight"]
    weight = next(model.parameters())
    before, answers = weight.detach().clone(), model(images).detach()
    optimizer = NullSpaceSGD([weight], [free], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    step = (weight - before).detach()
    assert float(step[:, 4:].abs().min()) > 100 * float(step[:, :4].abs().max())
    assert float((model(images).detach() - answers).abs().max()) < 1e-2 * float(step.norm())


def test_the_way_does_not_depend_on_the_scale_of_the_weights() -> None:
    """Behind a normalisation, doubled weights with halved gradients go twice as far."""
    steps = []
    for scale in (1.0, 2.0):
        weight = nn.Parameter(scale * torch.tensor([[3.0, 4.0]]))
        optimizer = NullSpaceSGD([weight], [None], lr=0.01)
        weight.grad = torch.tensor([[2.0, -1.0]]) / scale
        optimizer.step()
        steps.append((weight.detach() - scale * torch.tensor([[3.0, 4.0]])) / scale)
    assert torch.allclose(*steps)
    assert math.isclose(float(steps[0].norm()), 0.01 * 5, rel_tol=1e-5)  # clipped at norm 1


def test_the_last_layers_alone_and_no_hook_is_left() -> None:
    model = planted.model(False)
    images = planted.stripes(20, seed=1).pixels()
    every, last = free_directions(model, images), free_directions(model, images, depth=0.5)
    assert set(last) < set(every)
    assert list(last) == list(every)[len(every) - len(last) :]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_with_groups_and_very_wide_ones_are_left_out() -> None:
    wide = nn.Linear(8, WIDEST + 1)
    network = nn.Sequential(
        nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), wide, nn.Linear(WIDEST + 1, 2)
    )
    model = Classifier(network, num_classes=2)
    images = torch.rand(5, 2, 4, 4, generator=generator())
    assert list(free_directions(model, images)) == ["network.2.weight"]


def test_bfloat16_amplifies_nothing() -> None:
    """The moment of the inputs is summed in float32, whatever the network computes in."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1, stride=4),
        nn.ReLU(),
        nn.Conv2d(256, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3, num_classes=4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        free = free_directions(model, planted.stripes(60, seed=3).pixels(), depth=0.7)
    values = torch.linalg.eigvalsh(free["network.2.weight"].double())
    assert values.min() > -1e-4
    assert values.max() < 1 + 1e-4


def test_a_closure_makes_the_gradients_of_the_step() -> None:
    steps = []
    for closed in (True, False):
        weight = nn.Parameter(torch.ones(2, 3))
        free = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        optimizer = NullSpaceSGD([weight], [free], lr=0.1)

        def loss(weight: nn.Parameter = weight) -> torch.Tensor:
            total = weight.square().sum()
            total.backward()
            return total

        given = optimizer.step(loss) if closed else (loss(), optimizer.step())[0]
        assert given == 6.0
        steps.append(weight.detach())
    assert torch.equal(*steps)
    assert (steps[0][:, 1:] == 1).all()  # the projection holds
    assert (steps[0][:, 0] < 1).all()


def test_a_step_without_gradients_leaves_the_weights() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    NullSpaceSGD([weight], [None], lr=0.1).step()
    assert torch.equal(weight, torch.ones(2, 3))
