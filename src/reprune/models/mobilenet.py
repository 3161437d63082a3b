"""MobileNet-V2 for small images (Sandler et al., 2018): two of the five strides are 1."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = (  # expansion, channels, blocks, stride; the paper's table 2 has stride 2 in the second
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scaled(channels: int, width: float) -> int:
    """`channels * width` to the nearest multiple of 8, losing at most a tenth."""
    wanted = channels * width
    rounded = max(8, int(wanted / 8 + 0.5) * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a skip where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.skips else out


class MobileNetV2(nn.Module):
    """Stem, `STAGES` of `InvertedResidual`, 1x1 head, average pool, linear."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()
        )
        blocks = []
        for expansion, base, count, stride in STAGES:
            outputs = scaled(base, width)
            for position in range(count):
                step = stride if position == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, step, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        last = scaled(1280, max(1.0, width))
        self.head = nn.Sequential(
            nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()
        )
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(out.mean((2, 3)))
        return logits


def mobilenetv2(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    """MobileNet-V2 for images of about 32 pixels; `width` multiplies every channel count."""
    return MobileNetV2(num_classes, width)
