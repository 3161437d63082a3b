"""Pre-activation ResNet for small images (He et al., "Identity Mappings", 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; nothing after the addition.

    A projection shortcut, where the shape changes, takes the first activation; an identity
    shortcut takes the raw input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.projects = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential()
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = self.shortcut(active) if self.projects else x
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + skip


class PreActResNet(nn.Module):
    """Stem, four stages of `PreActBlock` (`width`, 2x, 4x, 8x channels), average pool, linear.

    The paper ends with a norm and a ReLU before the pool; the checkpoints in circulation for small
    images mostly do not, so `final_norm` is off unless asked for.
    """

    def __init__(
        self, depths: tuple[int, ...], num_classes: int, width: int, final_norm: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        channels = width
        for index, depth in enumerate(depths):
            outputs = width * 2**index
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(PreActBlock(channels, outputs, stride))
                channels = outputs
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels) if final_norm else None
        self.linear = nn.Linear(channels, num_classes)
        self.stages = len(depths)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for index in range(self.stages):
            out = self.get_submodule(f"layer{index + 1}")(out)
        if self.bn is not None:
            out = F.relu(self.bn(out))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def preactresnet18(
    num_classes: int = 10, width: int = 64, final_norm: bool = False
) -> PreActResNet:
    """Pre-activation ResNet-18 for images of about 32 pixels; `width` is the first stage's."""
    return PreActResNet((2, 2, 2, 2), num_classes, width, final_norm)
