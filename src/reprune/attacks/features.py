"""The features of a classifier: what its last linear layer reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ModelError


def last_features(model: Classifier, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from pixels `(n, c, h, w)` to the input of the last linear layer, `(n, d)`.

    The last layer is the linear layer (or convolution) with one output a class that is run last.
    The function works on a frozen copy in evaluation mode; gradients flow to its pixels.

    Args:
        model: the classifier; unchanged.
        images: a few pixels to find the layer with.

    Raises:
        ModelError: no such layer.
    """
    copied = model.clone().eval().requires_grad_(False)
    ran: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ran.append(module)

    hooks = [
        module.register_forward_pre_hook(note)
        for module in copied.network.modules()
        if _width(module) == model.num_classes
    ]
    with torch.no_grad():
        copied(images)
    for hook in hooks:
        hook.remove()
    if not ran:
        raise ModelError(
            f"features are read before the last linear layer, but the network has no linear layer "
            f"with {model.num_classes} outputs"
        )
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[:] = [args[0]]

    ran[-1].register_forward_pre_hook(keep)

    def features(pixels: Tensor) -> Tensor:
        copied(pixels)
        return read.pop().flatten(1).float()

    return features


def _width(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else -1
