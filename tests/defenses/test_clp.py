"""CLP: spectral norms of channels, and the outliers among them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import planted
from reprune.classifier import Classifier
from reprune.defenses.clp import CLP, lipschitz_bounds, spectral_norms, standard_scores
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.rnp import Pruning
from reprune.sites import find_sites


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(*layers: nn.Module, width: int) -> Classifier:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    return Classifier(nn.Sequential(*layers, *head), num_classes=3).eval()


def bounds(model: Classifier) -> torch.Tensor:
    (site,) = find_sites(model, torch.rand(2, 3, 8, 8, generator=seeded()))
    return lipschitz_bounds(model, site)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 16, 3, 3), (6, 1, 5, 5), (7, 9, 1, 1), (4, 2)])
def test_spectral_norms_are_those_of_an_svd(shape):
    kernels = torch.randn(shape, generator=seeded())
    matrices = kernels.reshape(shape[0], shape[1], -1).double()
    expected = torch.linalg.svdvals(matrices).max(1).values
    assert torch.allclose(spectral_norms(kernels), expected, rtol=1e-9)


def explicit(kernel: torch.Tensor, side: int, **options: int) -> torch.Tensor:
    """The matrix of one channel of a convolution, column by column of the identity."""
    inputs = kernel.shape[1] * side * side
    basis = torch.eye(inputs, dtype=kernel.dtype).view(inputs, kernel.shape[1], side, side)
    return nn.functional.conv2d(basis, kernel, **options).flatten(1).T


@pytest.mark.parametrize(
    ("options", "size"),
    [({"padding": 1}, 3), ({}, 3), ({"padding": 1, "stride": 2}, 3), ({"padding": 2}, 5)],
)
def test_the_whole_convolution_lies_within_a_known_factor(options, size):
    """It is never below the kernel's norm, and never above sqrt(positions) times it."""
    kernels = torch.randn(6, 2, size, size, generator=seeded(), dtype=torch.float64)
    above = []
    for kernel, norm in zip(kernels, spectral_norms(kernels), strict=True):
        exact = torch.linalg.matrix_norm(explicit(kernel[None], 8, **options), ord=2)
        frobenius = kernel.norm()
        assert norm <= frobenius <= exact * (1 + 1e-9)
        assert exact <= size * norm * (1 + 1e-9)
        above.append(float(exact / norm))
    assert max(above) > 1.05  # so the kernel's norm alone is no upper bound


def test_both_ends_of_that_range_are_reached():
    flat = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(explicit(flat, 24, padding=1), ord=2)
    assert float(exact / spectral_norms(flat)) == pytest.approx(3, rel=0.02)
    point = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    point[0, :, 1, 1] = torch.tensor([3.0, 4.0])
    exact = torch.linalg.matrix_norm(explicit(point, 8, padding=1), ord=2)
    assert float(exact) == pytest.approx(float(spectral_norms(point))) == pytest.approx(5)


def test_a_batch_norm_scales_each_channel():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.0, 0.5])
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 1.0, 0.0]))
    plain = spectral_norms(conv.weight).float()
    factors = torch.tensor([1.0, 1.0, 0.0, 0.5 / math.sqrt(norm.eps)])
    found = bounds(classifier(conv, norm, width=4))
    assert torch.allclose(found, plain * factors, rtol=1e-4)


def test_a_batch_norm_does_in_evaluation_what_the_bound_says():
    """The folded kernel of convolution and norm has that spectral norm."""
    model = planted.model(True)
    (first, *_) = find_sites(model, planted.stripes(2, seed=0).pixels())
    conv, norm = model.network[0], model.network[1]
    folded = nn.utils.fuse_conv_bn_eval(conv, norm)
    assert torch.allclose(
        lipschitz_bounds(model, first), spectral_norms(folded.weight).float(), rtol=1e-4
    )


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_norms_without_a_running_variance_scale_by_gamma(norm):
    conv = nn.Conv2d(3, 4, 3)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.0, 0.5])
    found = bounds(classifier(conv, norm, width=4))
    expected = spectral_norms(conv.weight).float() * norm.weight.detach().abs()
    assert torch.allclose(found, expected)


def test_layers_without_a_norm_are_their_kernel():
    conv = nn.Conv2d(3, 4, 3)
    found = bounds(classifier(conv, nn.ReLU(), width=4))
    assert torch.allclose(found, spectral_norms(conv.weight).float())
    weighted = nn.utils.parametrizations.weight_norm(conv)
    assert torch.allclose(bounds(classifier(weighted, nn.ReLU(), width=4)), found, rtol=1e-5)


def test_hidden_linear_layers_are_measured_by_the_length_of_their_rows():
    hidden = nn.Linear(48, 40)
    network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(40, 3))
    model = Classifier(network, num_classes=3).eval()
    (site,) = find_sites(model, torch.rand(2, 3, 4, 4))
    expected = hidden.weight.detach().norm(dim=1)
    assert torch.allclose(lipschitz_bounds(model, site), expected)


def test_standard_scores_are_zero_where_all_are_equal():
    assert standard_scores(torch.full((5,), 0.3)).tolist() == [0.0] * 5
    assert standard_scores(torch.tensor([2.0])).tolist() == [0.0]
    z = standard_scores(torch.tensor([1.0, 2.0, 3.0]))
    assert z.tolist() == pytest.approx([-1, 0, 1])


@pytest.fixture
def loud():
    """The planted model with one channel of its second layer turned up eightfold."""
    model = planted.model(True).clone()
    with torch.no_grad():
        model.network[4].weight[5] *= 8
    return model


def test_the_papers_rule_prunes_what_lies_above_u(loud):
    data = planted.stripes(200, seed=3)
    result = CLP.paper()(loud, data, generator=seeded())
    assert result.mask.pruned()["4.weight"] == result.mask.pruned()["4.bias"] == [5]
    other = CLP.paper()(loud, planted.stripes(120, seed=5), generator=seeded(1))
    assert result.mask.pruned() == other.mask.pruned()  # it reads no image
    eager = replace(CLP.paper(), u=1.0)(loud, data, generator=seeded())
    for site, channels in zip(find_sites(loud, data.pixels()), eager.trace.masks, strict=True):
        z = standard_scores(lipschitz_bounds(loud, site))
        assert list(channels.pruned) == (z > 1).nonzero().flatten().tolist()


def test_the_backdoor_weakens_within_the_budget():
    data, test = planted.stripes(400, seed=3), planted.stripes(400, seed=4)
    defense = CLP(u=1.0, pruning=Pruning(max_accuracy_drop=0.1))
    result = defense(planted.model(True), data, generator=seeded())
    for site in result.trace.masks:
        assert all(site.values[k] == 0 and site.scores[k] < -1 for k in site.pruned)
    assert result.trace.curve[result.trace.chosen].drop <= 0.1
    figures = evaluate(result.model, test, trigger=planted.trigger(), target=planted.TARGET)
    assert figures.asr.share < 0.7  # from 1.0
    assert figures.ca.share > 0.95


def test_layers_too_narrow_for_an_outlier_are_told(toy_model, toy_data):
    result = CLP()(toy_model, toy_data, generator=seeded())
    assert result.trace.notes == (
        "2 of 2 layers have too few channels for one to lie 3 standard deviations above the mean",
    )
    assert not result.mask.pruned()


@pytest.mark.parametrize("u", [math.nan, math.inf])
def test_u_must_be_a_number(u, toy_model, toy_data):
    with pytest.raises(ConfigurationError, match=f"u must be a finite number, got {u}"):
        CLP(u=u)(toy_model, toy_data, generator=seeded())


def test_settings():
    assert CLP.needs == ("clean labels",)  # the ranking uses none, the judge does
    assert CLP().u == 3
    assert CLP.paper().pruning == Pruning(by="threshold", amount=0.5)
