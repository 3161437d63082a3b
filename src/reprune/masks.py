"""`ChannelMask`: factors on a network's channels that never edit the network.

A mask multiplies parameters on the fly through `torch.func.functional_call`, so any module works
and no layer is rewritten. *Sites* are the places where a factor acts: the affine scale of a
normalisation layer that alone reads a convolution, else the convolution's own output channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, ModelError

_VIEWS = ("Permute", "Transpose", "View", "UnsafeView", "Reshape", "Alias", "Clone", "Contiguous")


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


class ChannelMask(Mapping[str, Tensor]):
    """Factors by parameter name: `{parameter: (channels,) in [0, 1]}`.

    Behaves as a read-only mapping; `keys()` are parameter names of the network.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> mask = ChannelMask({"1.weight": torch.tensor([1.0, 0.0, 1.0, 1.0])})
        >>> mask.pruned()
        {'1.weight': [1]}
    """

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        self._factors = dict(factors)

    def __getitem__(self, name: str) -> Tensor:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    @classmethod
    def over(cls, sites: Iterable[Site], values: Sequence[Tensor], *, shift: bool) -> ChannelMask:
        """Factors for `sites`; with `shift` the same factors act on the biases too."""
        factors: dict[str, Tensor] = {}
        for site, value in zip(sites, values, strict=True):
            factors[site.weight] = value
            if shift and site.bias is not None:
                factors[site.bias] = value
        return cls(factors)

    @classmethod
    def ones(cls, sites: Iterable[Site], *, shift: bool = False) -> ChannelMask:
        """The mask that changes nothing."""
        sites = tuple(sites)
        return cls.over(sites, [torch.ones(s.channels) for s in sites], shift=shift)

    def pruned(self) -> dict[str, list[int]]:
        """Channels whose factor is exactly zero, by parameter name."""
        found = {k: (v == 0).nonzero().flatten().tolist() for k, v in self.items()}
        return {name: channels for name, channels in found.items() if channels}

    def to(self, device: torch.device | str) -> ChannelMask:
        return ChannelMask({name: value.to(device) for name, value in self.items()})


def masked_parameters(network: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that `mask` names, each multiplied by its factors along dimension 0.

    Raises:
        ConfigurationError: a name the network does not have, or factors of the wrong length.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    masked = {}
    for name, factor in mask.items():
        if name not in parameters:
            raise ConfigurationError(f"the mask names {name!r}, which the network does not have")
        parameter = parameters[name]
        if factor.shape != parameter.shape[:1]:
            raise ConfigurationError(
                f"the mask of {name!r} must have shape {tuple(parameter.shape[:1])}, "
                f"got {tuple(factor.shape)}"
            )
        masked[name] = parameter * factor.view(-1, *[1] * (parameter.ndim - 1))
    return masked


def masked_call(
    model: Classifier, mask: Mapping[str, Tensor], images: Tensor, *, track_buffers: bool = False
) -> Tensor:
    r"""Logits of the masked network: $f(x; m \odot \theta)$ (RNP, Eqn. 3).

    Args:
        model: the classifier; its parameters and buffers stay as they are.
        mask: factors by parameter name.
        images: pixels `(n, c, h, w)` in [0, 1].
        track_buffers: let batch-norm statistics of a network in training mode move. Otherwise
            clones of the buffers are used.

    Returns:
        Logits `(n, classes)`, differentiable in the mask's factors.

    Raises:
        ConfigurationError: the mask does not fit the network.
    """
    tensors = masked_parameters(model.network, mask)
    if model.network.training and not track_buffers:
        tensors |= {name: buffer.clone() for name, buffer in model.network.named_buffers()}
    logits: Tensor = functional_call(model.network, tensors, (model.normalize(images),))
    return logits


@torch.no_grad()
def bake(model: Classifier, mask: Mapping[str, Tensor]) -> Classifier:
    """A copy of `model` with the mask multiplied into its parameters, in evaluation mode.

    Raises:
        ConfigurationError: the mask does not fit the network.
    """
    baked = model.clone()
    parameters = dict(baked.network.named_parameters(remove_duplicate=False))
    for name, value in masked_parameters(model.network, mask).items():
        parameters[name].copy_(value)
    return baked.eval()


def find_sites(
    model: Classifier,
    images: Tensor,
    *,
    linear: bool | None = None,
    layers: Sequence[str] | None = None,
) -> tuple[Site, ...]:
    """The places where channels of `model` can be masked, in order of execution.

    One forward pass records who reads whom (the autograd graph tells). A convolution read by a
    normalisation layer alone, views aside, is masked at that layer's scale; any other convolution
    at its own output channels. The last layer (the head) is never a site, nor are convolutions on
    pooled 1x1 maps without a normalisation (squeeze-and-excitation gates).

    Args:
        model: the classifier.
        images: a few pixels `(n, c, h, w)` to trace with.
        linear: also mask hidden linear layers; `None` does so where they hold most of the
            parameters outside the head (transformers, ConvNeXt, fully connected networks).
        layers: keep only sites under these module names or patterns (`"layer4"`, `"*.bn2"`).

    Raises:
        ModelError: the network has no channel that can be masked.
        ConfigurationError: `layers` matches nothing; the message lists the sites there are.
    """
    trace = _Trace(model, images)
    if linear is None:
        sizes = {True: 0, False: 0}
        for name in trace.order[:-1]:
            module = trace.modules[name]
            sizes[isinstance(module, nn.Linear)] += sum(p.numel() for p in module.parameters())
        linear = sizes[True] > sizes[False]
    sites = [
        site
        for name in trace.order[:-1]
        if linear or not isinstance(trace.modules[name], nn.Linear)
        if (site := trace.site(name)) is not None
    ]
    unique = tuple({site.weight: site for site in sites}.values())
    if not unique:
        raise ModelError(
            "the network has no prunable channel: it needs at least one convolution or hidden "
            "linear layer before its last layer"
        )
    if layers is None:
        return unique
    chosen = tuple(s for s in unique if any(_matches(s.name, pattern) for pattern in layers))
    if not chosen:
        raise ConfigurationError(
            f"no site matches {list(layers)}; there are {[s.name for s in unique]}"
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


class _Trace:
    """One forward pass: the order of the layers, and which autograd node reads which."""

    def __init__(self, model: Classifier, images: Tensor) -> None:
        self.modules = dict(model.network.named_modules())
        self.order: list[str] = []
        self.pooled: set[str] = set()
        self._made: dict[object, str] = {}  # autograd node -> layer that made it
        self._read: dict[object, str] = {}  # autograd node -> normalisation layer that reads it
        with model.evaluating(), torch.enable_grad():
            handles = [
                handle
                for name, module in self.modules.items()
                for handle in self._watch(name, module)
            ]
            try:
                logits = model(images.detach().clone().requires_grad_(True))
            finally:
                for handle in handles:
                    handle.remove()
        self._readers = _count_readers(logits.grad_fn)

    def _watch(self, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):

            def made(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                if name not in self.order:
                    self.order.append(name)
                if not isinstance(module, nn.Linear) and args[0].shape[2:].numel() == 1:
                    self.pooled.add(name)
                self._made[out.grad_fn] = name

            return [module.register_forward_hook(made)]
        if _is_normalization(module):

            def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._read.setdefault(_behind_views(args[0].grad_fn), name)

            return [module.register_forward_pre_hook(read)]
        return []

    def site(self, layer: str) -> Site | None:
        width = next(iter(self.modules[layer].parameters())).shape[0]
        node = next((node for node, made in self._made.items() if made == layer), None)
        norm = self._read.get(node)
        if norm is not None and self._readers.get(node, 0) <= 1:
            weight = self.modules[norm].weight
            if isinstance(weight, nn.Parameter) and weight.shape == (width,):
                return self._at(norm, layer, width)
        if layer in self.pooled or not isinstance(
            getattr(self.modules[layer], "weight", None), nn.Parameter
        ):
            return None
        return self._at(layer, layer, width)

    def _at(self, name: str, layer: str, channels: int) -> Site:
        bias = getattr(self.modules[name], "bias", None)
        return Site(
            name=name,
            layer=layer,
            weight=f"{name}.weight" if name else "weight",
            bias=(f"{name}.bias" if name else "bias") if isinstance(bias, nn.Parameter) else None,
            channels=channels,
        )


def _is_normalization(module: nn.Module) -> bool:
    known = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm))
    return known or (
        "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def _behind_views(node: object | None) -> object | None:
    """The node that computed the values, past nodes that only rearrange them."""
    while node is not None and type(node).__name__.startswith(_VIEWS):
        node = node.next_functions[0][0]  # type: ignore[attr-defined]
    return node


def _count_readers(root: object | None) -> dict[object, int]:
    readers: dict[object, int] = {}
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
