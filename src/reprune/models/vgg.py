"""VGG with batch norm for small images (Simonyan and Zisserman, 2015), one linear head."""

from __future__ import annotations

from torch import Tensor, nn


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ending in a max-pool; mean over space; linear.

    The mean makes any size from 32 pixels on work; at 32 pixels it averages a single position.
    """

    def __init__(self, convolutions: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, count in enumerate(convolutions):
            outputs = width * min(2**index, 8)
            for _ in range(count):
                layers += [
                    nn.Conv2d(channels, outputs, 3, padding=1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                ]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def vgg16(num_classes: int = 10, width: int = 64) -> VGG:
    """VGG-16 with batch norm, 32 pixels or more; `width` is the first stage's channels."""
    return VGG((2, 2, 3, 3, 3), num_classes, width)


def vgg19(num_classes: int = 10, width: int = 64) -> VGG:
    """VGG-19 with batch norm, 32 pixels or more; `width` is the first stage's channels."""
    return VGG((2, 2, 4, 4, 4), num_classes, width)
