"""The features of a classifier: what its last layer reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.layers import layer_input
from reprune.sites import find_head


class Features:
    """A classifier that also gives its penultimate features, the input of its last layer.

    Args:
        model: the classifier; a hook is set only while it is called.
        images: a few pixels `(n, c, h, w)` to find the last layer with.

    Raises:
        ModelError: a network without a linear or convolutional last layer.
    """

    def __init__(self, model: Classifier, images: Tensor) -> None:
        self.model = model
        self._head = model.network.get_submodule(find_head(model, images))
        with torch.no_grad(), model.evaluating():
            self.width = self(images)[0].shape[1]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `(n, c, h, w)` to features `(n, width)` and logits `(n, classes)`.

        Maps are averaged over their pixels and token sequences over their tokens.
        """
        read: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            read.append(layer_input(args, named))

        handle = self._head.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            logits = self.model(images)
        finally:
            handle.remove()
        found = read[-1]
        if found.ndim == 4:
            found = found.mean((2, 3))
        elif found.ndim == 3:
            found = found.mean(1)
        return found, logits


def frozen_features(model: Classifier, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from pixels to features `(n, width)`, float32, differentiable in the pixels.

    It works on a frozen copy in evaluation mode. Arguments and errors as of `Features`.
    """
    read = Features(model.clone().eval(), images)
    read.model.requires_grad_(False)
    return lambda pixels: read(pixels)[0].float()
