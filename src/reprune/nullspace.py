"""Directions of the weights that clean images leave free, and an optimiser that keeps to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import at_once
from reprune.layers import layer_input

CHUNK = 64
"""Images in one pass, fewer of large ones."""

WIDEST = 5000
"""Inputs of a layer at most: the matrix of a wider one costs more than the layer is worth."""


@torch.no_grad()
def free_directions(
    model: Classifier, images: Tensor, *, ridge: float = 0.1, depth: float = 1.0
) -> dict[str, Tensor]:
    r"""For the weight of each convolution and linear layer, what clean images do not feel.

    A layer computes $W u$ from its inputs $u$, for a convolution the patches under its kernel. A
    change $\Delta P$ with

    $$P = \rho (C + \rho I)^{-1}, \qquad C = E[u u^T], \qquad
      \rho = \mathrm{ridge} \cdot \mathrm{tr}(C) / n$$

    hardly moves the answers to clean images: P is near 0 in directions that their inputs fill and
    near 1 in those that they leave free.

    Source: Wang et al., "Training networks in null space of feature covariance for continual
    learning", CVPR 2021, with a ridge instead of a cut through the spectrum.

    Args:
        model: the classifier; it is not changed.
        images: clean pixels `(n, c, h, w)` on its device.
        ridge: directions with less than this share of the mean energy count as free; positive.
        depth: share of the layers, the last ones that are executed, in (0, 1].

    Returns:
        By parameter name of `model`, symmetric `(n, n)` float32 matrices in the flat order of the
        weight's inputs. Left out are layers with groups, with more than `WIDEST` inputs, and
        weights that are computed anew in each call.
    """
    with model.evaluating():
        sums = _Sums(model)
        with sums.watching():
            model(images[:1])
        names = list(sums.moments)
        chosen = names[int((1 - depth) * len(names)) :]
        sums = _Sums(model, chosen)
        with sums.watching():
            for part in torch.split(images, at_once(CHUNK, images.shape[1:])):
                model(part)
    return {name: _free(moment, ridge) for name, moment in sums.moments.items()}


def _free(moment: Tensor, ridge: float) -> Tensor:
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    rho = ridge * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(moment + rho * eye)
    return (rho * torch.cholesky_inverse(factor)).float()


class _Sums:
    """Second moments of the inputs of layers, float64, in the order of execution."""

    def __init__(self, model: Classifier, only: Iterable[str] | None = None) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self.moments: dict[str, Tensor] = {}
        self._layers: list[tuple[str, nn.Conv2d | nn.Linear]] = []
        for module in model.modules():
            if isinstance(module, nn.Linear) or (
                isinstance(module, nn.Conv2d) and module.groups == 1
            ):
                weight = module.weight
                name = names.get(id(weight))
                if name is None or weight[0].numel() > WIDEST:
                    continue
                if only is None or name in only:
                    self._layers.append((name, module))

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            m.register_forward_pre_hook(self._adder(name), with_kwargs=True)
            for name, m in self._layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adder(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def add(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            given = layer_input(args, named)
            with torch.autocast(given.device.type, enabled=False):
                inputs = _inputs(module, given.float())
                moment = (inputs.T @ inputs).double()
            self.moments[name] = self.moments[name] + moment if name in self.moments else moment

        return add


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer's weight is multiplied with, one row a product."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x.contiguous(), _padding(layer), mode=mode)
    patches = nn.functional.unfold(
        padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )
    return patches.transpose(1, 2).flatten(0, 1)


def _padding(layer: nn.Conv2d) -> list[int]:
    """Left, right, top, bottom."""
    if layer.padding == "valid":
        return [0] * 4
    if not isinstance(layer.padding, str):
        return [p for side in reversed(layer.padding) for p in (side, side)]
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]


class NullSpaceSGD(torch.optim.SGD):
    r"""SGD with momentum 0.9 whose steps keep to given directions, in units of the weights.

    $$W \leftarrow W - \eta \, s^2 \, \mathrm{clip}(G) P$$

    s is the norm that W had at the start, so that $\eta$ is relative and a network whose weights
    are scaled, as normalisation layers allow, makes the same way. All gradients, in these units,
    are clipped together.

    Args:
        parameters: what is trained.
        free: for each of them a matrix of `free_directions`, or `None` for every direction.
        lr: learning rate.
        clip: largest norm of all gradients together, in units of the weights.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        free: Sequence[Tensor | None],
        *,
        lr: float,
        clip: float = 1.0,
    ) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        self._clip = clip
        self._rules = [
            (p, matrix, p.detach().norm()) for p, matrix in zip(parameters, free, strict=True)
        ]

    def step(self, closure: Any = None) -> Any:
        """One step from the gradients that are there, if any; they are overwritten.

        A `closure` makes them first; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = [rule for rule in self._rules if rule[0].grad is not None]
        if not rules:
            return loss
        with torch.no_grad(), torch.autocast(rules[0][0].device.type, enabled=False):
            lengths = [scale * p.grad.norm() for p, _, scale in rules if p.grad is not None]
            factor = (self._clip / torch.stack(lengths).norm().clamp_min(1e-12)).clamp_max(1.0)
            for parameter, matrix, scale in rules:
                assert parameter.grad is not None
                gradient = factor * scale.square() * parameter.grad
                if matrix is not None:
                    gradient = (gradient.flatten(1).to(matrix) @ matrix).view_as(gradient)
                parameter.grad.copy_(gradient)
        super().step()
        return loss
