"""I-BAU: the hypergradient against closed forms and TorchOpt, the perturbation, the removal."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.ibau import IBAU
from reprune.defenses.implicit import implicit_loss, project
from reprune.errors import ConfigurationError, ModelError
from reprune.evaluation import evaluate, predict
from reprune.types import silent

cross_entropy = nn.functional.cross_entropy


class Quadratic:
    """Inner: half d'Ad - d'Bt, solved by d = A^-1 Bt. Outer: half |d - goal|^2 + c't."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        root = normal(4, 4)
        self.a = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
        self.b, self.c, self.goal = normal(4, 3), normal(3), normal(4)
        self.theta = normal(3).requires_grad_(True)
        self.rate = 1 / float(torch.linalg.eigvalsh(self.a).max())

    @property
    def solution(self) -> Tensor:
        return torch.linalg.solve(self.a, self.b @ self.theta).detach()

    def outer(self, delta: Tensor) -> Tensor:
        return (delta - self.goal).square().sum() / 2 + self.c @ self.theta

    def step(self, delta: Tensor) -> Tensor:
        return delta - self.rate * (self.a @ delta - self.b @ self.theta)

    def gradient(self, iterations: int) -> Tensor:
        loss = implicit_loss(self.outer, self.step, self.solution, iterations=iterations)
        return torch.autograd.grad(loss, self.theta)[0]

    @property
    def exact(self) -> Tensor:
        return self.c + self.b.T @ torch.linalg.solve(self.a, self.solution - self.goal)


def test_the_hypergradient_of_a_quadratic_problem_is_its_closed_form():
    problem = Quadratic()
    torch.testing.assert_close(problem.gradient(80), problem.exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_few_iterations_give_the_truncated_series(iterations):
    problem = Quadratic()
    pull = torch.eye(4, dtype=torch.float64) - problem.rate * problem.a
    first = problem.solution - problem.goal
    series = sum(torch.linalg.matrix_power(pull, k) @ first for k in range(iterations + 1))
    expected = problem.c + problem.rate * problem.b.T @ series
    torch.testing.assert_close(problem.gradient(iterations), expected)


def test_the_value_is_that_of_the_outer_loss():
    problem = Quadratic()
    loss = implicit_loss(problem.outer, problem.step, problem.solution, iterations=3)
    torch.testing.assert_close(loss, problem.outer(problem.solution))


def test_torchopt_finds_the_same_hypergradient_of_a_network():
    """A robust perturbation of a small smooth network, penalised so that it is a strict minimum."""
    torchopt = pytest.importorskip("torchopt")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((12, 3), generator=generator, dtype=torch.float64)
    y = torch.arange(12) % 2
    theta = torch.randn((3, 2), generator=generator, dtype=torch.float64).requires_grad_(True)

    def loss(delta: Tensor, theta: Tensor) -> Tensor:
        return cross_entropy(torch.tanh(x + delta) @ theta, y)

    def inner(delta: Tensor, theta: Tensor) -> Tensor:
        return -loss(delta, theta) + delta.square().sum()

    optimality = torch.func.grad(inner)

    @torchopt.diff.implicit.custom_root(
        optimality,
        argnums=1,
        solve=torchopt.linear_solve.solve_normal_cg(maxiter=100, atol=1e-12),
    )
    def solve(delta: Tensor, theta: Tensor) -> Tensor:
        for _ in range(100):
            delta = delta - 0.3 * optimality(delta, theta)
        return delta

    solution = solve(torch.zeros(3, dtype=torch.float64), theta)
    expected = torch.autograd.grad(loss(solution, theta), theta)[0]

    def step(delta: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(inner(delta, theta), delta, create_graph=True)
        return delta - 0.3 * gradient

    ours = implicit_loss(lambda d: loss(d, theta), step, solution.detach(), iterations=60)
    found = torch.autograd.grad(ours, theta)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    direct = torch.autograd.grad(loss(solution.detach(), theta), theta)[0]
    assert (direct - expected).norm() > 1e-3  # what looks through the solution counts


def test_an_update_that_stretches_does_not_explode():
    theta = torch.ones(2, requires_grad=True)
    loss = implicit_loss(torch.sum, lambda d: 1e6 * d + theta, torch.zeros(2), iterations=9)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.norm() <= 10 * 2**0.5 + 1e-4


def test_the_projection_is_the_nearest_point_of_the_ball():
    inside, outside = torch.tensor([0.3, 0.4]), torch.tensor([[3.0], [4.0]])
    torch.testing.assert_close(project(inside, 1.0), inside)
    torch.testing.assert_close(project(outside, 2.0), torch.tensor([[1.2], [1.6]]))
    torch.testing.assert_close(project(torch.zeros(2), 1.0), torch.zeros(2))


@pytest.mark.parametrize("ascent_lr", [None, 10.0])
def test_the_perturbation_raises_the_loss_within_its_radius(ascent_lr, generator, unchanged):
    model, data = planted.model(backdoored=True), planted.stripes(200, seed=3)
    radius = 1.5
    method = IBAU(batch_size=50, ascent_lr=ascent_lr)
    with unchanged(model):
        delta = method.perturb(model, data, radius, generator=generator, progress=silent)
    assert delta.shape == (1, 3, planted.SIDE, planted.SIDE)
    assert delta.norm() <= radius * (1 + 1e-5)
    noise = torch.randn(delta.shape, generator=generator)
    noise *= radius / noise.norm()
    losses = [
        float(cross_entropy(predict(model, ImageSet(data.pixels() + d, data.labels)), data.labels))
        for d in (torch.zeros_like(delta), noise, delta)
    ]
    assert losses[2] > 2 * max(losses[:2])


def test_the_planted_backdoor_goes(generator):
    model, test = planted.model(backdoored=True), planted.stripes(400, seed=5)
    goal = {"trigger": planted.trigger(), "target": planted.TARGET}
    before = evaluate(model, test, **goal)
    method = IBAU(rounds=16, batch_size=20, iterations=1, ascents=1, radius=2.5, clean=0.5)
    result = method(model, planted.stripes(120, seed=4), generator=generator)
    after = evaluate(result.model, test, **goal)
    assert before.asr.share > 0.9
    assert after.asr.share < 0.5
    assert after.ca.share > before.ca.share - 0.05


def test_batch_norm_keeps_its_statistics(generator):
    model = planted.model(backdoored=True)
    result = IBAU(rounds=1)(model, planted.stripes(80, seed=4), generator=generator)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(result.model.named_buffers())[name])


class Attention(nn.Module):
    """Patches, fused attention, a head."""

    def __init__(self, attend: object = nn.functional.scaled_dot_product_attention) -> None:
        super().__init__()
        self.patches, self.attend = nn.Conv2d(3, 8, 4, stride=4), attend
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        means = x.mean((2, 3)) * 50
        return self.head(self.attend(tokens, tokens, tokens).mean(1)) * 0.1 + means


def test_networks_with_fused_attention_work(toy_data, generator):
    model = Classifier(Attention(), num_classes=3)
    IBAU(rounds=1)(model, toy_data, generator=generator)


class Once(torch.autograd.Function):
    """The identity, differentiable once."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def test_a_network_without_second_derivatives_is_refused_before_any_work(
    toy_data, generator, unchanged
):
    model = Classifier(Attention(lambda q, k, v: Once.apply(q)), num_classes=3)
    told: list[object] = []
    with unchanged(model), pytest.raises(ModelError, match="cannot be differentiated twice"):
        IBAU()(model, toy_data, generator=generator, progress=lambda *c, **_: told.append(c))
    assert told == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rounds", 0, "rounds must be at least 1, got 0"),
        ("iterations", -1, "iterations must not be negative, got -1"),
        ("radius", 0.0, "radius must be positive, got 0.0"),
        ("lr", float("nan"), "lr must be positive, got nan"),
        ("clip_norm", 0.0, "clip_norm must be positive, got 0.0"),
        ("clean", 1.5, r"clean must lie in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_work(field, value, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(IBAU(), **{field: value}).check()


def test_gradients_do_not_stay_on_the_result(toy_model, toy_data, generator):
    result = IBAU(rounds=1)(copy.deepcopy(toy_model), toy_data, generator=generator)
    assert all(p.grad is None and p.requires_grad for p in result.model.parameters())
