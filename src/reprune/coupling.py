"""Which channels hang together, which of them only ever carry zero, and how to cut them out.

The dependency graph of `torch-pruning` says which layers must lose a channel together and which
read it. Whether these read zero is measured, with the other weights redrawn, so that no channel
passes that is merely silent on a few images.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from reprune.classifier import Classifier
from reprune.errors import PruningError
from reprune.layers import layer_input

_TRIALS = 3


def trace(network: nn.Module, example: Tensor) -> Any:
    """The dependency graph of `network`, which it puts into evaluation mode.

    Raises:
        PruningError: `torch-pruning` fails; the message is its own.
    """
    try:
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                network, example_inputs=(example,), verbose=False
            )
    except Exception as error:  # torch-pruning raises whatever it stumbles over
        raise PruningError(
            f"the network's layers cannot be traced by torch-pruning: {error!r}. "
            "Use the masked model: its outputs are the same"
        ) from error


@torch.no_grad()
def nonzero_inputs(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """Which input channels of each convolution and linear layer can be other than zero.

    Zeros stay and every other number is redrawn around its size: weights with a random sign,
    shifts and scales positive, so that activations are not silent by accident.

    Args:
        model: a classifier in evaluation mode, on the CPU; a copy is redrawn.
        images: only the shape counts.

    Returns:
        Boolean tensors `(input channels,)` by layer.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def read(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            x = layer_input(args, named).movedim(-1 if isinstance(module, nn.Linear) else 1, 0)
            now = (x != 0).flatten(1).any(1)
            found[name] = found[name] | now if name in found else now

        return read

    for _ in range(_TRIALS):
        twin = model.clone().eval()
        means = {id(m.running_mean) for m in twin.modules() if isinstance(m, _NormBase)}
        for p in [*twin.network.parameters(), *twin.network.buffers()]:
            if not p.is_floating_point():
                continue
            size = p.abs() * (0.5 + torch.rand(p.shape, generator=generator))
            if p.ndim > 1:
                size *= torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            p.copy_(-size if id(p) in means else size)
        for name, module in twin.network.named_modules():
            if isinstance(module, _ConvNd | nn.Linear):
                module.register_forward_pre_hook(watch(name), with_kwargs=True)
        twin(torch.rand(images.shape, generator=generator))
    return found


def removable(
    network: nn.Module,
    graph: Any,
    nonzero: dict[str, Tensor],
    layer: str,
    channels: tuple[int, ...],
) -> tuple[tuple[int, ...], str]:
    """The channels that only readers of zeros read, and why the others are not among them."""
    names = {module: name for name, module in network.named_modules()}
    module = network.get_submodule(layer)
    if module not in graph.module2node or graph.get_pruner_of_module(module) is None:
        return (), "torch-pruning does not see this layer"
    wanted = set(channels)
    reason = ""
    while wanted:
        bad: set[int | None] = set()
        group = tied_group(graph, module, sorted(wanted))
        for item in group:
            module_there = item.dep.target.module
            if mixes := _mixes(module_there):
                return (), f"coupled to {names.get(module_there)}, {mixes}"
        for item in group:
            reader = names.get(item.dep.target.module, "")
            if not reads(graph, item.dep):
                continue
            if reader not in nonzero:
                return (), f"what {reader} reads cannot be observed"
            hit = {r for i, r in zip(item.idxs, item.root_idxs, strict=True) if nonzero[reader][i]}
            if hit and not reason:
                tied = _unmasked(group, hit, names)
                reason = f"{reader} still reads other than zero there" + (
                    f"; coupled and not masked: {tied}" if tied else ""
                )
            bad |= hit
        if not bad:
            break
        wanted = set() if None in bad else {c for c in wanted if c not in bad}
    return tuple(sorted(wanted)), reason


def cut(
    network: nn.Module,
    graph: Any,
    plan: dict[str, tuple[int, ...]],
    reasons: dict[str, list[str]],
) -> dict[str, tuple[int, ...]]:
    """Prunes `network` in place; returns what went, by layer, in the original numbering."""
    names = {module: name for name, module in network.named_modules()}
    present: dict[str, list[int]] = {}  # original numbers of the channels that are left
    removed: dict[str, set[int]] = defaultdict(set)
    for layer, channels in plan.items():
        module = network.get_submodule(layer)
        left = present.setdefault(layer, list(range(graph.get_out_channels(module))))
        wanted = [left.index(c) for c in channels if c in left]
        while wanted:
            group = tied_group(graph, module, wanted)
            shrunk = [
                (item, width)
                for item in group
                if item.dep.target.module in names
                and not reads(graph, item.dep)
                and (width := graph.get_out_channels(item.dep.target.module)) is not None
            ]
            emptied = [item for item, width in shrunk if len(item.idxs) >= width]
            if not emptied:
                break
            reasons.setdefault(layer, []).append("a layer must keep at least one channel")
            wanted.remove(emptied[0].root_idxs[0])
        if not wanted:
            continue
        for item, width in shrunk:
            name = names[item.dep.target.module]
            now = present.setdefault(name, list(range(width)))
            removed[name] |= {now[i] for i in item.idxs}
            present[name] = [c for c in now if c not in removed[name]]
        group.prune()
    return {name: tuple(sorted(removed[name])) for name in names.values() if name in removed}


def tied_group(graph: Any, module: nn.Module, channels: list[int] | None = None) -> Any:
    """What loses these output channels of `module` (all by default) together with it.

    Raises:
        PruningError: the tracer does not know this layer.
    """
    if channels is None:
        if module not in graph.module2node or graph.get_pruner_of_module(module) is None:
            raise PruningError(f"torch-pruning does not see a {type(module).__name__}")
        channels = list(range(graph.get_out_channels(module)))
    prune = graph.get_pruner_of_module(module).prune_out_channels
    return graph.get_pruning_group(module, prune, channels)


def reads(graph: Any, dep: Any) -> bool:
    """Whether the layer loses input channels and keeps its outputs."""
    pruner = graph.get_pruner_of_module(dep.target.module)
    return bool(
        pruner.prune_in_channels != pruner.prune_out_channels
        and dep.handler == pruner.prune_in_channels
    )


def _mixes(module: nn.Module) -> str:
    """Why single channels of this layer cannot go, or an empty text."""
    if isinstance(module, _ConvNd):
        depthwise = module.groups == module.in_channels == module.out_channels
        return "" if module.groups == 1 or depthwise else "a grouped convolution"
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return "which normalises over channels"
    known = isinstance(module, _NormBase | nn.Linear | nn.PReLU | nn.Parameter)
    if known or not any(True for _ in module.parameters()):
        return ""
    return f"a {type(module).__name__}"


def _unmasked(group: Any, roots: set[Any], names: dict[nn.Module, str]) -> str:
    """A few coupled normalisation layers that are not at zero in these channels."""
    tied = []
    for item in group:
        module = item.dep.target.module
        if isinstance(module, _BatchNorm) and module.affine:
            rows = [i for i, r in zip(item.idxs, item.root_idxs, strict=True) if r in roots]
            if bool((module.weight[rows] != 0).any()) or bool((module.bias[rows] != 0).any()):
                tied.append(names[module])
    return ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
