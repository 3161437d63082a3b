"""`ChannelMask`: factors on a network's channels that never edit the network.

A mask multiplies parameters on the fly through `torch.func.functional_call`, so any module works
and no layer is rewritten. *Sites* are the places where a factor acts: the affine scale of a
normalisation layer that alone reads a convolution, else the convolution's own output channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.sites import Site, join


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
        scaled = parameter * factor.view(-1, *[1] * (parameter.ndim - 1))
        masked[name] = scaled.to(parameter.dtype)
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
    network = model.network
    parameters = dict(network.named_parameters(remove_duplicate=False))
    masked = masked_parameters(network, mask)
    swaps = {id(parameters[name]): tensor for name, tensor in masked.items()}
    if not track_buffers and any(module.training for module in network.modules()):
        swaps |= {id(buffer): buffer.clone() for buffer in network.buffers()}
    outputs = functional_call(
        network, _places(network, swaps), (model.normalize(images),), tie_weights=False
    )
    return model.first(outputs)


def _places(network: nn.Module, swaps: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """`swaps` (by id of the tensor to replace) under each name that reaches another module.

    `functional_call` with `tie_weights` would leave its tensors behind in a module with two names.
    """
    return {
        join(path, name): swaps[id(tensor)]
        for path, module in network.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in swaps
    }


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
