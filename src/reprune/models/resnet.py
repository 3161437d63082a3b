"""ResNet for small images (He et al., 2016, with a 3x3 stem and no max-pool)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages of `BasicBlock` (`width`, 2x, 4x, 8x channels), average pool, linear."""

    def __init__(self, depths: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for index, depth in enumerate(depths):
            outputs = width * 2**index
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(BasicBlock(channels, outputs, stride))
                channels = outputs
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, num_classes)
        self.stages = len(depths)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            out = self.get_submodule(f"layer{index + 1}")(out)
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def resnet18(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-18 for images of about 32 pixels; `width` is the first stage's channels."""
    return ResNet((2, 2, 2, 2), num_classes, width)


def resnet34(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-34 for images of about 32 pixels; `width` is the first stage's channels."""
    return ResNet((3, 4, 6, 3), num_classes, width)
