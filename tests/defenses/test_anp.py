"""ANP: the noise against a closed form and on a network, masks, the removal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.defenses.anp import ANP, noisy_factors, worst_noise
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.masks import masked_call
from reprune.sites import find_sites

CPU = torch.device("cpu")
cross_entropy = nn.functional.cross_entropy


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_noise_of_a_linear_loss_is_its_closed_form(steps):
    """Every entry moves by eps towards the sign of its slope, and stops at the bound."""
    slopes = (torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, 0.5]))

    def loss(noise: list[Tensor]) -> Tensor:
        return sum((s * n).sum() for s, n in zip(slopes, noise, strict=True))

    found = worst_noise(loss, [3, 2], eps=0.4, steps=steps, generator=seeded(), device=CPU)
    start = (2 * torch.rand(5, generator=seeded()) - 1) * 0.4
    expected = (start + 0.4 * torch.cat(slopes).sign()).clamp(-0.4, 0.4)
    torch.testing.assert_close(torch.cat(found), expected)
    assert [len(part) for part in found] == [3, 2]
    assert not any(part.requires_grad for part in found)


def test_the_noise_raises_the_loss_of_a_network_and_stays_within_eps():
    model, data = planted.model(backdoored=True), planted.stripes(128, seed=3)
    sites = find_sites(model, data.pixels(slice(0, 2)))
    ones = [torch.ones(site.channels) for site in sites]
    sizes = [site.channels for site in sites] * 2

    def loss(noise: tuple[Tensor, ...] | None) -> Tensor:
        factors = noisy_factors(sites, ones, noise)
        return cross_entropy(masked_call(model, factors, data.pixels()), data.labels)

    worst = worst_noise(loss, sizes, eps=0.4, steps=1, generator=seeded(), device=CPU)
    assert max(float(part.abs().max()) for part in worst) <= 0.4 + 1e-6
    at_random = (2 * torch.rand(sum(sizes), generator=seeded()) - 1) * 0.4
    random = float(loss(torch.split(at_random, sizes)))
    assert float(loss(worst)) > 2 * max(random, float(loss(None)))


def test_factors_act_on_the_scale_and_on_the_shift():
    """A convolution with bias and no norm: (m + delta) w and (1 + xi) b, by hand."""
    conv = nn.Conv2d(3, 2, 1)
    network = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    model, x = Classifier(network, num_classes=2), torch.rand(4, 3, 2, 2)
    mask, delta, xi = torch.tensor([0.5, 1.0]), torch.tensor([0.1, -0.2]), torch.tensor([0.3, -0.4])
    (site,) = find_sites(model, x)
    logits = masked_call(model, noisy_factors([site], [mask], [delta, xi]), x)
    scaled = (mask + delta)[:, None] * conv.weight.flatten(1)
    hidden = torch.einsum("nchw,kc->nkhw", x, scaled) + ((1 + xi) * conv.bias)[:, None, None]
    torch.testing.assert_close(logits, network[1:](hidden))


def test_the_planted_backdoor_falls_and_clean_accuracy_holds(generator, unchanged):
    model, test = planted.model(backdoored=True), planted.stripes(400, seed=5)
    goal = {"trigger": planted.trigger(), "target": planted.TARGET}
    before = evaluate(model, test, **goal)
    method = ANP(steps=50, batch_size=64)
    with unchanged(model):
        result = method(model, planted.stripes(400, seed=4), generator=generator)
    after = evaluate(result.model, test, **goal)
    assert before.asr.share > 0.9
    assert after.asr.share < 0.5
    assert after.ca.share > before.ca.share - 0.1


def test_masks_are_clipped_and_scores_order_those_at_zero(generator):
    method = ANP(steps=40, batch_size=64, lr=1.0)
    data = planted.stripes(120, seed=4)
    trace = method(planted.model(backdoored=True), data, generator=generator).trace
    values = torch.cat([torch.tensor(site.values) for site in trace.masks])
    scores = torch.cat([torch.tensor(site.scores) for site in trace.masks])
    assert values.min() == 0
    assert values.max() <= 1
    assert torch.equal(scores[values > 0], values[values > 0])
    assert (scores[values == 0] <= 0).all()
    assert len(scores[values == 0].unique()) > 1


def test_it_takes_the_steps_it_says(toy_model, toy_data, generator):
    told: list[tuple[str, int, int]] = []
    method = ANP(steps=5, batch_size=20)
    method(toy_model, toy_data, generator=generator, progress=lambda *c, **_: told.append(c))
    assert [done for phase, done, _ in told if phase == "mask"] == [1, 2, 3, 4, 5]


def test_the_paper_prunes_scales_by_a_threshold():
    pruning = ANP.paper().pruning
    assert (pruning.by, pruning.amount, pruning.shift) == ("threshold", 0.2, False)
    assert (ANP.paper().steps, ANP.paper().eps, ANP.paper().alpha) == (2000, 0.4, 0.2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("lr", 0.0, "lr must be positive, got 0.0"),
        ("eps", -0.1, "eps must be positive, got -0.1"),
        ("alpha", 2.0, r"alpha must lie in \[0, 1\], got 2.0"),
        ("momentum", 1.0, r"momentum must lie in \[0, 1\), got 1.0"),
        ("batch_norm", "both", "batch_norm must be 'train' or 'eval', got 'both'"),
        ("holdout", 0.0, r"holdout must lie in \(0, 1\), got 0.0"),
    ],
)
def test_settings_that_cannot_work(field, value, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(ANP(), **{field: value}).check()
