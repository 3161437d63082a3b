"""Projected gradient ascent on the loss of a classifier, within a budget in pixel space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.precision import autocast
from reprune.types import Progress, silent


def check_pgd(eps: float, step: float, steps: int) -> None:
    """Raises `ConfigurationError` for a budget, step or number of steps out of its range."""
    for name, value in (("eps", eps), ("step", step)):
        if not 0 < value <= 1:
            raise ConfigurationError(f"{name} must lie in (0, 1] (16/255, not 16), got {value}")
    if steps < 1:
        raise ConfigurationError(f"steps must be at least 1, got {steps}")


def pgd(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    generator: torch.Generator | None = None,
    batch_size: int = 250,
    progress: Progress = silent,
    phase: str = "pgd",
) -> Tensor:
    r"""Images near the given ones that the model gets wrong (Madry et al., 2018, equation 2).

    `x <- clip(x + step * sign(grad_x CE(f(x), y)), x0 - eps, x0 + eps)`, kept in [0, 1]:
    untargeted, in the L-infinity norm. The model is run in evaluation mode; its weights, gradients
    and the modes of its layers are as before afterwards.

    Args:
        model: the classifier `f`.
        images: pixels `x0`, `(n, c, h, w)`; unchanged.
        labels: true classes `y`, `(n,)`.
        eps: largest change of a pixel, in (0, 1].
        step: change of a pixel in one step, in (0, 1].
        steps: gradient steps, at least 1.
        generator: for a start drawn uniformly within the budget; `None` starts at the images.
        batch_size: images a forward pass.
        progress: told after each batch, as `phase`.

    Raises:
        ConfigurationError: a budget, step or number of steps out of its range.
    """
    check_pgd(eps, step, steps)
    parts: list[Tensor] = []
    with model.evaluating():
        for rows in torch.split(torch.arange(len(images), device=images.device), batch_size):
            parts.append(_ascend(model, images[rows], labels[rows], eps, step, steps, generator))
            progress(phase, sum(map(len, parts)), len(images))
    return torch.cat(parts) if parts else images.clone()


def _ascend(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    step: float,
    steps: int,
    generator: torch.Generator | None,
) -> Tensor:
    low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    now = images.detach().clone()
    if generator is not None:
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        now = (now + eps * (2 * noise - 1)).clamp(low, high)
    for _ in range(steps):
        with torch.enable_grad(), autocast(images.device):
            now = now.requires_grad_(True)
            loss = nn.functional.cross_entropy(model(now).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, now)
        now = (now.detach() + step * gradient.sign()).clamp(low, high)
    return now.contiguous()
