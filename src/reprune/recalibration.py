"""`recalibrated`: batch norms that give clean images what they gave them before a repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once
from reprune.layers import layer_input

BATCH = 512

Statistics = tuple[Tensor, Tensor]
"""Mean and variance of each channel."""


@torch.no_grad()
def recalibrated(changed: Classifier, original: Classifier, data: ImageSet) -> Classifier:
    r"""A copy of `changed` whose batch norms answer clean images as those of `original` do.

    $$v' = v \frac{v_c}{v_o},\quad \mu' = m_c - (m_o - \mu) \sqrt{v_c / v_o}$$

    With changed weights, clean images have other activations (mean $m_c$, variance $v_c$ of a
    channel) than with the original ones ($m_o$, $v_o$), while a batch norm subtracts the $\mu$ and
    divides by the $v$ of the training. With $\mu'$ and $v'$ instead its output has the mean and
    variance again that it had for clean images. (Taking $m_c$ and $v_c$ themselves would also
    change what the images of the training, triggered ones among them, had to do with it, and wakes
    what is left of a backdoor.) From the first batch norm to the last, each on what those before
    it give now. One that is called more or less than once an image, or that keeps no statistics,
    stays as it is, and so does a channel that clean images leave constant.

    Source: this package; after re-estimated statistics (Izmailov et al., "Averaging weights leads
    to wider optima and better generalization", UAI 2018, section 3.2).

    Args:
        changed: a classifier built like `original`; it is not changed.
        original: the classifier that it came from; it is not changed.
        data: clean images, at least two; labels are not used.
    """
    copy = changed.clone().eval()
    norms, own = batch_norms(original), batch_norms(copy)
    kept = {name: _statistics_of(norm) for name, norm in own.items()}
    sums: dict[str, Statistics] = {}
    for images, _ in data.batches(max(2, at_once(BATCH, data.shape))):
        share = len(images) / len(data)
        with original.evaluating(), _called(norms) as calls:
            original(images)
        once = {name: found[0] for name, found in calls.items() if len(found) == 1}
        with _matching(own, kept, once):
            copy(images)
        for name in once:
            mean, variance = (share * part for part in _statistics_of(own[name]))
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + mean, before[1] + variance
    for name, found in sums.items():
        _set_statistics(own[name], *found)
    return copy


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """By name, the batch norms of a model that keep statistics."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


@contextmanager
def _called(norms: dict[str, Any]) -> Iterator[dict[str, list[Statistics]]]:
    """Inside, what each batch norm is given, call by call."""
    calls: dict[str, list[Statistics]] = {name: [] for name in norms}

    def listener(name: str) -> Callable[..., None]:
        return lambda _, args, named: calls[name].append(_moments(layer_input(args, named)))

    with _hooked(norms, listener):
        yield calls


@contextmanager
def _matching(
    own: dict[str, Any], kept: dict[str, Statistics], wanted: dict[str, Statistics]
) -> Iterator[None]:
    """Inside, each batch norm in `wanted` is set before it answers."""

    def setter(name: str) -> Callable[..., None]:
        def match(norm: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name not in wanted:
                return
            (mean, variance), (usual, spread) = kept[name], wanted[name]
            now, width = _moments(layer_input(args, named))
            varies, ratio = (spread > 0) & (width > 0), width / spread
            moved = now - (usual - mean) * ratio.sqrt()
            wider = ((variance + norm.eps) * ratio - norm.eps).clamp(min=0)
            _set_statistics(
                norm, torch.where(varies, moved, mean), torch.where(varies, wider, variance)
            )

        return match

    with _hooked(own, setter):
        yield


@contextmanager
def _hooked(norms: dict[str, Any], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, norm in norms.items():
            handle = norm.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _moments(activations: Tensor) -> Statistics:
    channels = activations.float().transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1, correction=0)


def _statistics_of(norm: Any) -> Statistics:
    return norm.running_mean.clone(), norm.running_var.clone()


def _set_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
