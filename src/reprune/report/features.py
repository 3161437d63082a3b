"""Feature maps: how strongly each place of an image moves a layer (RNP, Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.layers import layer_outputs


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
    with model.evaluating(), layer_outputs(model, layers) as outputs:
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
