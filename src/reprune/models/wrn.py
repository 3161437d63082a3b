"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from reprune.errors import ConfigurationError
from reprune.models.preactresnet import PreActBlock


class WideResNet(nn.Module):
    """Stem (16 channels), three stages of pre-activation blocks (16k, 32k, 64k), norm, linear."""

    def __init__(self, blocks: int, factor: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels = 16
        for index in range(3):
            outputs = 16 * factor * 2**index
            stage = []
            for position in range(blocks):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(PreActBlock(channels, outputs, stride))
                channels = outputs
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for index in range(3):
            out = self.get_submodule(f"layer{index + 1}")(out)
        out = F.relu(self.bn(out))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def wrn(depth: int, factor: int, num_classes: int = 10) -> WideResNet:
    """WRN-`depth`-`factor` for images of about 32 pixels: `wrn(28, 10)` is WRN-28-10.

    Raises:
        ConfigurationError: `depth` is not 6n + 4 with n >= 1, or `factor` is below 1.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ConfigurationError(
            f"a wide ResNet's depth is 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}"
        )
    if factor < 1:
        raise ConfigurationError(f"a wide ResNet's widening factor is at least 1, got {factor}")
    return WideResNet(blocks, factor, num_classes)
