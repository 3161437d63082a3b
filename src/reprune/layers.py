"""Which layers are worth looking at, and what they give out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier

_STAGE = re.compile(r"(layer|stage|block|denseblock)_?\d+$")


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
    with model.evaluating(), layer_outputs(model, [*stages, *leaves]) as outputs:
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
def layer_outputs(model: Classifier, layers: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Outputs by layer, in order of execution, of the last forward pass; with their gradients."""
    outputs: dict[str, Any] = {}
    modules = dict(model.network.named_modules())
    handles = []

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # A copy, because a later layer may work in place.
            outputs[name] = output.clone() if isinstance(output, Tensor) else output

        return keep

    try:
        for name in dict.fromkeys(layers):
            handles.append(modules[name].register_forward_hook(keeper(name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def layer_input(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer was called with, from a hook `with_kwargs`: by place or by name."""
    given: Tensor = args[0] if args else named["input"]
    return given


def channels_last(output: Tensor, module: nn.Module, channels: int) -> Tensor:
    """What a module gives out, `(n, ..., channels)`: the dimension of channels at the end."""
    last = isinstance(module, nn.Linear) or type(module) is nn.LayerNorm
    if last or output.shape[1] != channels:
        return output
    return output.movedim(1, -1)


@torch.no_grad()
def with_channels_last(model: Classifier, images: Tensor, layers: Iterable[str]) -> frozenset[str]:
    """Those of `layers` whose maps are `(n, h, w, c)`, not `(n, c, h, w)`.

    In smaller images maps are smaller and channels as many. Where the network does not take them,
    or the maps stay as large, channels lie last if the other two dimensions agree and they do not.

    Args:
        model: the classifier; it is not changed.
        images: a few pixels `(n, c, h, w)` to trace with.
        layers: their names.
    """
    twin = model.clone().eval()  # networks may keep what depends on the size
    height, width = (side // 2 for side in images.shape[2:])
    with layer_outputs(twin, layers) as outputs:
        twin(images)
        whole = _shapes(outputs)
        outputs.clear()
        with suppress(Exception):  # networks check their input with every type
            twin(images[:, :, :height, :width])
        smaller = _shapes(outputs)
    return frozenset(n for n, maps in whole.items() if _lie_last(maps, smaller.get(n, maps)))


def _shapes(outputs: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Of the maps among the outputs of layers."""
    return {n: o.shape for n, o in outputs.items() if isinstance(o, Tensor) and o.ndim == 4}


def _lie_last(maps: torch.Size, smaller: torch.Size) -> bool:
    """Whether channels lie last, by the shapes of a layer's maps for images and smaller ones."""
    if maps[1] != smaller[1]:
        return True
    return maps[3] == smaller[3] and maps[1] == maps[2] != maps[3]
