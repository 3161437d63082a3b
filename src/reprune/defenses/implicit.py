"""The gradient of a loss that looks through the solution of another optimisation problem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def implicit_loss(
    outer: Callable[[Tensor], Tensor],
    step: Callable[[Tensor], Tensor],
    solution: Tensor,
    *,
    iterations: int,
) -> Tensor:
    r"""The outer loss at an inner solution, with the implicit hypergradient as its gradient.

    For a fixed point $\delta^* = \Phi(\delta^*, \theta)$ of the inner problem's update

    $$\frac{d L}{d\theta} = \partial_\theta L
      + \partial_\theta \Phi^\top (I - \partial_\delta \Phi^\top)^{-1} \partial_\delta L,$$

    where the inverse is the limit of $v_{k+1} = \partial_\delta \Phi^\top v_k + \partial_\delta L$
    from $v_0 = \partial_\delta L$. The result is $L + v_K^\top \Phi$ less its own value, $v_K$ held
    constant: it equals $L$, and its gradient in $\theta$ is the sum above.

    An update that stretches no vector has $\lVert v_k \rVert \le (k+1) \lVert v_0 \rVert$; longer
    iterates are cut to that length, so that a solution which is none cannot make them explode.

    Source: Zeng et al., ICLR 2022, Section 4; Grazzi et al., ICML 2020, Algorithm 1.

    Args:
        outer: the outer loss of a solution, a scalar; $\theta$ is whatever it closes over.
        step: one update of the inner solver, of the shape of `solution`, differentiable twice.
        solution: where the inner solver ended; detached.
        iterations: K; 0 keeps the first term of the sum only.

    Returns:
        A scalar to call `backward` on; nothing flows into `solution`.
    """
    start = solution.detach().requires_grad_(True)
    value = outer(start)
    (first,) = torch.autograd.grad(value, start, retain_graph=True)
    after = step(start)
    vector = first
    for k in range(1, iterations + 1):
        (pulled,) = torch.autograd.grad(after, start, vector, retain_graph=True)
        vector = pulled + first
        longest = (k + 1) * first.norm()
        vector = vector * (longest / vector.norm().clamp_min(1e-30)).clamp(max=1)
    through = (vector * after).sum()
    return value + through - through.detach()


def project(vector: Tensor, radius: float) -> Tensor:
    """The nearest point of the L2 ball of `radius` around zero, over all dimensions together."""
    scale: Tensor = radius / vector.norm().clamp_min(radius)
    return vector * scale
