"""Physical removal: a smaller network with the same outputs as the masked one.

A pruned channel may go if every layer that reads it reads exactly zero (see `coupling`). The
smaller network must reproduce the masked one's logits before it is returned; layers that stand in
the way of that stay masked in place.

Hidden channels go in ResNets (inside a block), plain chains, MobileNets and EfficientNets (masked
after the depthwise convolution), DenseNets (inside a layer), GoogLeNet, and the MLPs of ConvNeXt
and ViT. What writes to a residual or dense stream stays unless all its writers are masked;
attention, grouped convolutions, and what layer or group normalisation reads always stay. ShuffleNet
cannot be traced.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from reprune.classifier import Classifier
from reprune.coupling import cut, nonzero_inputs, removable, trace
from reprune.errors import ConfigurationError, DataError, PruningError, RepruneError
from reprune.files import atomic_file
from reprune.masks import bake

TOLERANCE = 1e-5
"""Largest allowed difference, as a share of the largest logit (at least 1)."""


@dataclass(frozen=True)
class Removal:
    r"""What `remove_channels` returns.

    Attributes:
        model: the smaller classifier, a new object in evaluation mode.
        removed: channels that are gone, by layer: the masked ones and the layers coupled to them.
        kept: channels at zero that had to stay, with the reason, by masked layer.
        parameters_before, parameters_after: number of weights.
        macs_before, macs_after: multiplications of one image in convolutions and matrix products.
        max_difference: $\max |z' - z| / \max(1, \max |z|)$, where $z$ are the logits of the masked
            model on the given images and $z'$ those of the smaller one, float32 on the CPU.
    """

    model: Classifier
    removed: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[tuple[int, ...], str]]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    max_difference: float


def remove_channels(model: Classifier, mask: Mapping[str, Tensor], images: Tensor) -> Removal:
    r"""Cuts out the channels at zero: $f'(x) = f(x; m \odot \theta)$ with fewer parameters.

    A channel goes if its scale and its shift are zero and every layer that reads it reads zero:
    inside a residual block, between expansion and projection, along a plain chain. A channel of a
    residual stream goes only if everything that writes to it is masked there. One channel of a
    layer always stays. Layers that mix channels on the way (layer and group normalisation, grouped
    convolutions, attention) stay masked in place.

    Args:
        model: the classifier; never changed. The mask may be baked in already.
        mask: factors `(channels,)` by parameter name, as `ChannelMask`.
        images: pixels `(n, c, h, w)` in [0, 1] to trace and to compare outputs with.

    Raises:
        PruningError: the mask leaves a constant behind (scale at zero, shift not), the network
            cannot be traced, or not a single channel can be removed; the message says why.
        ConfigurationError: the mask does not fit the network.
        DataError: no images, or not of shape `(n, c, h, w)`.

    Example:
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()]
        >>> model = Classifier(nn.Sequential(*layers), num_classes=2)
        >>> factor = torch.tensor([1.0, 0.0, 1.0, 1.0])
        >>> mask = {"0.weight": factor, "0.bias": factor}
        >>> remove_channels(model, mask, torch.rand(2, 3, 5, 5)).removed
        {'0': (1,)}
    """
    if images.ndim != 4 or not len(images):
        raise DataError(f"images must have shape (n, c, h, w), n > 0; got {tuple(images.shape)}")
    device = model.device
    baked = bake(model, mask).cpu()  # float32 without TF32
    work = _Work(baked, images.detach().cpu())
    zeros, kept = _zero_channels(baked.network, mask)
    plan = {}
    if zeros:
        graph, nonzero = trace(baked.network, work.example), nonzero_inputs(baked, work.inputs)
        for layer, channels in zeros.items():
            try:
                plan[layer], reason = removable(baked.network, graph, nonzero, layer, channels)
            except Exception as error:  # wrong or missing indices in torch-pruning's graph
                plan[layer], reason = (), f"torch-pruning cannot follow its channels: {error!r}"
            kept[layer] = (channels, reason)
    plan = {layer: channels for layer, channels in plan.items() if channels}
    reasons = {layer: [reason] for layer, (_, reason) in kept.items() if reason}
    settled = work.settle(plan, reasons)
    smaller, removed, difference = work.attempt(settled, reasons)
    left = {
        layer: (rest, "; ".join(dict.fromkeys(reasons.get(layer, []))))
        for layer, (channels, _) in kept.items()
        if (rest := tuple(c for c in channels if c not in removed.get(layer, ())))
    }
    if kept and not removed:
        why = [f"{layer}: {reason}" for layer, (_, reason) in left.items()]
        more = f" and {len(why) - 5} more" if len(why) > 5 else ""
        raise PruningError(
            f"no channel can be removed from this network; {'; '.join(why[:5])}{more}. "
            "Use the masked model: its outputs are the same"
        )
    return Removal(
        model=smaller.to(device),
        removed=removed,
        kept=left,
        parameters_before=sum(p.numel() for p in model.parameters()),
        parameters_after=sum(p.numel() for p in smaller.parameters()),
        macs_before=work.macs(baked),
        macs_after=work.macs(smaller),
        max_difference=difference,
    )


def export_removed(removal: Removal, images: Tensor, path: str | Path) -> None:
    """Writes the smaller classifier as a `torch.export` program that needs no code of its own.

    The program takes pixels `(n, c, h, w)` in [0, 1] for any `n` and returns logits; read it with
    `torch.export.load(path).module()`. Its shapes fit no named architecture, so weights alone
    would not do.

    Args:
        removal: what `remove_channels` returned.
        images: pixels `(n, c, h, w)` to trace with.
        path: file to write, ending in `.pt2`.

    Raises:
        ConfigurationError: `path` does not end in `.pt2`.
        PruningError: the network cannot be exported; the message is that of `torch.export`.
        OutputError: the file cannot be written.

    Example:
        >>> export_removed(removal, images, "smaller.pt2")  # doctest: +SKIP
        >>> logits = torch.export.load("smaller.pt2").module()(images)  # doctest: +SKIP
    """
    if Path(path).suffix != ".pt2":
        raise ConfigurationError(f"an exported program must be named *.pt2, got {path}")
    model = copy.deepcopy(removal.model).eval().requires_grad_(False)
    example = images[:1].expand(2, *images.shape[1:]).to(model.device)
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(model, (example.clone(),), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever a foreign forward may raise
        raise PruningError(f"the smaller network cannot be exported: {error}") from error
    with atomic_file(path) as file:
        torch.export.save(program, file)


class _Work:
    """The masked model, what it must output, and attempts at smaller ones."""

    def __init__(self, baked: Classifier, images: Tensor) -> None:
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
        self.baked = baked
        self.inputs = torch.cat([images, noise])
        self.count = len(images)
        self.example = baked.normalize(self.inputs[:2])
        with torch.no_grad():
            self.expected: Tensor = baked(self.inputs)

    def settle(
        self, plan: dict[str, tuple[int, ...]], reasons: dict[str, list[str]]
    ) -> dict[str, tuple[int, ...]]:
        """The part of `plan` that leaves the outputs alone, found by halving."""
        try:
            self.attempt(plan, defaultdict(list))
            return plan
        except PruningError as error:
            if len(plan) == 1:
                reasons.setdefault(next(iter(plan)), []).append(str(error))
                return {}
        items = list(plan.items())
        half = len(items) // 2
        first = self.settle(dict(items[:half]), reasons)
        second = self.settle(dict(items[half:]), reasons)
        if not (first and second):
            return first or second
        try:
            self.attempt(first | second, defaultdict(list))
        except PruningError as error:
            for layer in second:
                reasons.setdefault(layer, []).append(str(error))
            return first
        return first | second

    def attempt(
        self, plan: dict[str, tuple[int, ...]], reasons: dict[str, list[str]]
    ) -> tuple[Classifier, dict[str, tuple[int, ...]], float]:
        """A copy without the planned channels, what went, and the difference it makes.

        Raises:
            PruningError: the copy does not run or its outputs differ.
        """
        smaller = self.baked.clone().eval()
        try:
            removed = {}
            if plan:
                graph = trace(smaller.network, self.example)
                removed = cut(smaller.network, graph, plan, reasons)
            with torch.no_grad():
                logits: Tensor = smaller(self.inputs)
            gap = (logits - self.expected).abs()
        except RepruneError:
            raise
        except Exception as error:  # torch-pruning, or a forward with fixed sizes
            raise PruningError(f"without them the network does not run: {error}") from error
        scale = max(1.0, float(self.expected.abs().max()))
        if not float(gap.max()) <= TOLERANCE * scale:
            raise PruningError(
                f"without them the outputs change by {float(gap.max()) / scale:.2g} "
                "(relative to the largest): some layer mixes channels"
            )
        return smaller, removed, float(gap[: self.count].max()) / scale

    def macs(self, model: Classifier) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(self.inputs[:1])
        return int(counter.get_total_flops()) // 2


def _zero_channels(
    network: nn.Module, mask: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[tuple[int, ...], str]]]:
    """Channels at zero by layer, and those of parameters that are no layer's output channels."""
    zeros: dict[str, tuple[int, ...]] = {}
    kept: dict[str, tuple[tuple[int, ...], str]] = {}
    constants = []
    for name, factor in mask.items():
        channels = tuple((factor == 0).nonzero().flatten().tolist())
        layer, _, leaf = name.rpartition(".")
        if not channels or leaf == "bias":
            continue
        module = network.get_submodule(layer)
        if leaf != "weight" or isinstance(module, _ConvTransposeNd):
            kept[name] = (channels, "the parameter does not hold a layer's output channels")
            continue
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and bool((bias[list(channels)] != 0).any()):
            constants.append(layer)
        zeros[layer] = channels
    if constants:
        raise PruningError(
            f"the mask sets the scale to zero but not the shift in {', '.join(constants[:5])}"
            f"{', ...' if len(constants) > 5 else ''}: a constant remains, which the next layers "
            "read. Prune the shift too: ChannelMask.over(..., shift=True), Pruning(shift=True)"
        )
    return zeros, kept
