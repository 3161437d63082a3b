"""`fold_norms`: batch norms inside of the layers before them, where no weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

CLOSE = 1e-2
"""What folding may change an output by, which is rounding (of TF32, too), over the largest one."""


@torch.no_grad()
def fold_norms(network: nn.Module, forward: Callable[[], Tensor]) -> bool:
    r"""Put each batch norm into the convolution or linear layer whose output it takes.

    $$\gamma \frac{W x + b - \mu}{\sqrt{v + \epsilon}} + \beta = W' x + b'$$

    In evaluation mode outputs, and their gradients on the input, change by rounding alone, and it
    saves a part of the time. What the layer gives may be used elsewhere, too: where the outputs
    differ afterwards, the norms are tried one by one, and those that change them stay.

    Args:
        network: in evaluation mode; changed in place.
        forward: calls it on a few images and returns its outputs.

    Returns:
        Whether anything was folded.
    """
    if not any(map(_is_norm, network.modules())):
        return False
    pairs, wanted = _pairs(network, forward)
    if not pairs or _folded(network, pairs, forward, wanted):
        return bool(pairs)
    return sum(_folded(network, [pair], forward, wanted) for pair in pairs) > 0


def _folded(
    network: nn.Module,
    pairs: Sequence[tuple[str, str]],
    forward: Callable[[], Tensor],
    wanted: Tensor,
) -> bool:
    """Folds all of these pairs, or none where the outputs are others then; says which."""
    replaced = {name: network.get_submodule(name) for pair in pairs for name in pair}
    for layer, norm in pairs:
        fuse: Any = fuse_linear_bn_eval if _is_linear(replaced[layer]) else fuse_conv_bn_eval
        network.set_submodule(layer, fuse(replaced[layer], replaced[norm]))
        network.set_submodule(norm, nn.Identity())
    if _close(forward(), wanted):
        return True
    for name, module in replaced.items():
        network.set_submodule(name, module)
    return False


def _pairs(
    network: nn.Module, forward: Callable[[], Tensor]
) -> tuple[list[tuple[str, str]], Tensor]:
    """Layers that are called once, and the norms that take their outputs as they are."""
    given: dict[int, tuple[str, Tensor]] = {}
    calls: list[str] = []
    pairs = []

    def look(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls.append(name)
            if not _is_norm(module):
                given[id(output)] = name, output  # kept, so that no other gets its id
            elif args and id(args[0]) in given:
                pairs.append((given[id(args[0])][0], name))

        return seen

    named = [(name, module) for name, module in network.named_modules() if _is_plain(module)]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        outputs = forward()
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if all(calls.count(name) == 1 for name in pair)], outputs


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a layer, or a norm of evaluation mode, and does what torch's does alone."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (_is_linear(module) or type(module) is nn.Conv2d or _is_norm(module))


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _is_norm(module: nn.Module) -> bool:
    if type(module) is nn.BatchNorm1d or type(module) is nn.BatchNorm2d:
        return not module.training and module.running_mean is not None
    return False


def _close(outputs: Tensor, wanted: Tensor) -> bool:
    return bool((outputs - wanted).abs().max() <= CLOSE * wanted.abs().max())
