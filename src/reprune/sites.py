"""Sites: the places in a network where its channels can be masked, found by tracing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from reprune.classifier import CUT_OFF, Classifier
from reprune.errors import ConfigurationError, ModelError
from reprune.layers import layer_input

_VIEWS = ("Permute", "Transpose", "View", "UnsafeView", "Reshape", "Alias", "Clone", "Contiguous")
_SCALES = ("weight", "parametrizations.weight.original0", "weight_g")  # plain, weight_norm new, old


@dataclass(frozen=True)
class Site:
    """One layer whose output channels can be masked.

    Attributes:
        name: the masked module in the network, as in `named_modules`.
        layer: the convolution or linear layer that computes the channels; equals `name` where no
            normalisation follows.
        weight: parameter that carries the scale, first dimension `channels`.
        bias: parameter that carries the shift, or `None`.
        channels: number of channels.
    """

    name: str
    layer: str
    weight: str
    bias: str | None
    channels: int


def find_sites(
    model: Classifier,
    images: Tensor,
    *,
    linear: bool | None = None,
    layers: Sequence[str] | None = None,
) -> tuple[Site, ...]:
    """The places where channels of `model` can be masked, in order of execution.

    One forward pass of a copy records who reads whom (the autograd graph tells). A convolution read
    by a normalisation layer alone, views aside, is masked at that layer's scale; any other
    convolution at its own output channels. Never sites are the head (a layer whose outputs become
    the logits with no layer between), convolutions on pooled 1x1 maps without a normalisation
    (squeeze-and-excitation gates), and layers from which no gradient path leads to the logits.

    Args:
        model: the classifier.
        images: a few pixels `(n, c, h, w)` to trace with.
        linear: also mask hidden linear layers; `None` does so where they hold most of the
            parameters outside the head (transformers, ConvNeXt, fully connected networks).
        layers: keep only sites under these module names or patterns (`"layer4"`, `"*.bn2"`).

    Raises:
        ModelError: the network has no channel that can be masked, or cuts the gradient off.
        ConfigurationError: one of `layers` matches nothing; the message lists the sites there are.
    """
    trace = _Trace(model, images)
    hidden = [name for name in trace.layers() if name not in trace.heads]
    if linear is None:
        sizes = {True: 0, False: 0}
        for name in hidden:
            module = trace.modules[name]
            sizes[isinstance(module, nn.Linear)] += sum(p.numel() for p in module.parameters())
        linear = sizes[True] > sizes[False]
    unique: dict[int, Site] = {}  # by parameter: one that several layers share is masked once
    for node, name in trace.made.items():
        if name in hidden and (linear or not isinstance(trace.modules[name], nn.Linear)):
            site = trace.site(node, name)
            if site is not None:
                unique.setdefault(id(trace.parameters[site.weight]), site)
    sites = tuple(unique.values())
    if not sites:
        raise ModelError(
            "the network has no prunable channel: it needs at least one convolution or hidden "
            "linear layer before its last layer"
        )
    if layers is None:
        return sites
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    names = [site.name for site in sites]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigurationError(f"no site matches {pattern!r}; there are {', '.join(names)}")
    return tuple(s for s in sites if any(_matches(s.name, pattern) for pattern in patterns))


def find_head(model: Classifier, images: Tensor) -> str:
    """The layer whose outputs become the logits with no layer between; the last, if several.

    Args:
        model: the classifier.
        images: a few pixels `(n, c, h, w)` to trace with.

    Raises:
        ModelError: no convolution or linear layer leads to the logits, or the gradient is cut off.
    """
    trace = _Trace(model, images)
    heads = [name for name in trace.layers() if name in trace.heads]
    if not heads:
        raise ModelError("the network has no linear or convolutional layer that gives the logits")
    return heads[-1]


def sole_norms(model: Classifier, images: Tensor) -> dict[str, str]:
    """Layers whose outputs a normalisation layer alone reads, views aside, and that one's name.

    Layers and normalisations that are called several times are left out.

    Args:
        model: the classifier.
        images: a few pixels `(n, c, h, w)` to trace with.

    Raises:
        ModelError: the model cannot be copied, or the network cuts the gradient off.
    """
    trace = _Trace(model, images)
    calls = Counter(trace.made.values())
    found = {name: trace.norm(node) for node, name in trace.made.items() if calls[name] == 1}
    read = Counter(found.values())
    return {layer: norm for layer, norm in found.items() if norm and read[norm] == 1}


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


class _Trace:
    """One forward pass of a copy: which autograd node each layer made, and which node reads which.

    Attributes:
        modules, parameters: of the copy, by name.
        made: autograd node -> layer that made it, in order of execution.
        heads: layers whose outputs become the logits with no other layer between.
    """

    def __init__(self, model: Classifier, images: Tensor) -> None:
        self.made: dict[object, str] = {}
        self._norms: dict[object, tuple[str, list[object]]] = {}
        self._pooled: set[object] = set()
        with torch.inference_mode(False), torch.enable_grad():
            copied = model.clone().eval()
            self.modules = dict(copied.network.named_modules())
            self.parameters = dict(copied.network.named_parameters(remove_duplicate=False))
            for name, module in self.modules.items():
                self._watch(name, module)
            logits = copied(images.detach().clone().requires_grad_(True))
        if logits.grad_fn is None:
            raise ModelError(CUT_OFF)
        self._readers = _count_readers(logits.grad_fn)
        self.made = {node: name for node, name in self.made.items() if node in self._readers}
        self.heads = self._find_heads(logits)

    def _watch(self, name: str, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):

            def made(_: nn.Module, args: Any, named: dict[str, Any], out: Tensor) -> None:
                if out.grad_fn is not None:
                    self.made[out.grad_fn] = name
                    if layer_input(args, named).shape[2:].numel() == 1:
                        self._pooled.add(out.grad_fn)

            module.register_forward_hook(made, with_kwargs=True)
        elif _is_normalization(module):

            def read(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
                if args or "input" in named:
                    *views, node = _views_behind(layer_input(args, named).grad_fn, self.made)
                    self._norms.setdefault(node, (name, views))

            module.register_forward_pre_hook(read, with_kwargs=True)

    def layers(self) -> list[str]:
        """The layers on a gradient path to the logits, in order of their first execution."""
        return list(dict.fromkeys(self.made.values()))

    def _find_heads(self, logits: Tensor) -> set[str]:
        reached: set[str] = set()
        seen: set[object] = {logits.grad_fn}
        todo: list[object] = [logits.grad_fn]
        while todo:
            node = todo.pop()
            if node in self.made:
                reached.add(self.made[node])
                continue
            parents = {parent for parent, _ in getattr(node, "next_functions", ())} - seen
            seen |= parents
            todo += parents
        heads = {name for name in reached if self._width(name) == logits.shape[1]}
        last = self.layers()[-1:]
        return heads or {name for name in last if isinstance(self.modules[name], nn.Linear)}

    def _width(self, layer: str) -> int:
        module = self.modules[layer]
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        return int(width)

    def norm(self, node: object) -> str:
        """What alone normalises the outputs that a layer computed at `node`; empty for nothing."""
        norm, views = self._norms.get(node, ("", []))
        return norm if all(self._readers.get(one, 0) <= 1 for one in (node, *views)) else ""

    def site(self, node: object, layer: str) -> Site | None:
        """Where the channels are masked that `layer` computed at `node`."""
        width = self._width(layer)
        norm = self.norm(node)
        if norm:
            weight = self.modules[norm].weight
            if isinstance(weight, nn.Parameter) and weight.shape == (width,):
                return self._at(norm, "weight", layer, width)
        if node in self._pooled and not isinstance(self.modules[layer], nn.Linear):
            return None
        for scale in _SCALES:
            parameter = self.parameters.get(join(layer, scale))
            if parameter is not None and (scale == "weight" or parameter.numel() == width):
                return self._at(layer, scale, layer, width)
        return None

    def _at(self, name: str, scale: str, layer: str, channels: int) -> Site:
        bias = join(name, "bias")
        return Site(
            name=name,
            layer=layer,
            weight=join(name, scale),
            bias=bias if bias in self.parameters else None,
            channels=channels,
        )


def join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _is_normalization(module: nn.Module) -> bool:
    known = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm))
    return known or (
        "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def _views_behind(node: object | None, made: Mapping[object, str]) -> list[object | None]:
    """The nodes back from `node` that only rearrange values, and last the one that computes."""
    path = [node]
    while node not in made and type(node).__name__.startswith(_VIEWS):
        node = node.next_functions[0][0]  # type: ignore[union-attr]
        path.append(node)
    return path


def _count_readers(root: object | None) -> dict[object, int]:
    """How many nodes read each node; the keys are all nodes from which a path leads to `root`."""
    readers: dict[object, int] = {root: 0}
    seen, todo = {root}, [root]
    while todo:
        node = todo.pop()
        for parent, _ in getattr(node, "next_functions", ()):
            if parent is None:
                continue
            readers[parent] = readers.get(parent, 0) + 1
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return readers
