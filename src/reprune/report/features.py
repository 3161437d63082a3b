"""Feature maps: how strongly each place of an image moves a layer (RNP, Figure 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError

_STAGE = re.compile(r"(layer|stage|block|denseblock)_?\d+$")


@torch.no_grad()
def feature_maps(model: Classifier, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    r"""Mean absolute activation over the channels: $\frac{1}{C} \sum_c |a_c|$, by layer.

    The model runs in evaluation mode; its weights, statistics, modes and hooks stay as they are,
    after an exception too.

    Args:
        model: the classifier.
        images: a few pixels `(n, c, h, w)` in [0, 1] on the model's device.
        layers: names of modules of `model.network`.

    Returns:
        For each layer a float32 tensor `(n, h', w')` on the CPU, values at least 0.

    Raises:
        ConfigurationError: a layer that the network does not have, that the forward pass does
            not reach, or whose output is not `(n, channels, h', w')`.

    Example:
        >>> model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), num_classes=16)
        >>> feature_maps(model, torch.rand(5, 3, 4, 4), ["0"])["0"].shape
        torch.Size([5, 2, 2])
    """
    modules = dict(model.network.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise ConfigurationError(f"the network has no layer {unknown}; `named_modules` lists them")
    with _outputs(model, layers) as outputs:
        model(images)
    maps = {}
    for name in layers:
        output = outputs.get(name)
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigurationError(
                f"feature maps need layers with outputs (n, channels, h, w); {name!r} gives {shape}"
            )
        maps[name] = output.detach().float().abs().mean(1).cpu()
    return maps


@torch.no_grad()
def default_layers(model: Classifier, images: Tensor, count: int = 4) -> tuple[str, ...]:
    """Layers worth looking at: the network's stages, else layers evenly spaced in its depth.

    Stages are modules called `layer1`, `stage2`, `block3` ... of the outermost level that has at
    least two. Otherwise `count` modules without children are taken whose outputs are maps
    `(n, channels, h, w)` larger than 1x1.

    Args:
        model: the classifier; it is not changed.
        images: a few pixels `(n, c, h, w)` to trace with.
        count: how many layers at most.

    Returns:
        Names in order of execution; empty where the network has no such layer.
    """
    leaves = [n for n, m in model.network.named_modules() if n and not any(m.children())]
    stages = _stages(model.network)
    with _outputs(model, [*stages, *leaves]) as outputs:
        model(images)
    for names in (stages, leaves):
        maps = [n for n, out in outputs.items() if n in names and _is_map(out)]
        if len(maps) >= 2 or (names is leaves and maps):
            return tuple(_spread(maps, count))
    return ()


def _stages(network: nn.Module) -> list[str]:
    by_level: dict[int, list[str]] = {}
    for name, _ in network.named_modules():
        if _STAGE.match(name.rpartition(".")[2]):
            by_level.setdefault(name.count("."), []).append(name)
    return next((by_level[k] for k in sorted(by_level) if len(by_level[k]) > 1), [])


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1


def _spread(names: list[str], count: int) -> list[str]:
    """At most `count` of `names`, evenly spaced, the last one among them."""
    step = max(1.0, len(names) / count)
    picks = {len(names) - 1 - round(i * step) for i in range(count)}
    return [names[i] for i in sorted(picks) if i >= 0]


@contextmanager
def _outputs(model: Classifier, layers: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Outputs by layer, in order of execution, of forward passes in evaluation mode."""
    outputs: dict[str, Any] = {}
    modules = dict(model.network.named_modules())
    handles = []

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # A copy, because a later layer may work in place.
            outputs[name] = output.clone() if isinstance(output, Tensor) else output

        return keep

    with model.evaluating():
        try:
            for name in dict.fromkeys(layers):
                handles.append(modules[name].register_forward_hook(keeper(name)))
            yield outputs
        finally:
            for handle in handles:
                handle.remove()
