"""EfficientNet-B0 for small images (Tan and Le, 2019): the stem has stride 1.

No stochastic depth: the network is the same function in every training step but for the dropout
before the linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from reprune.models.mobilenet import scaled

STAGES = (  # expansion, channels, blocks, stride, kernel: the paper's table 1
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class MBConv(nn.Module):
    """1x1 expansion, depthwise, squeeze-excite, linear 1x1 projection; skip if shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
        )
        self.se = SqueezeExcite(hidden, max(1, inputs // 4))
        self.project = nn.Sequential(
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + out if self.skips else out


class EfficientNet(nn.Module):
    """Stem, `STAGES` of `MBConv`, 1x1 head, average pool, dropout, linear."""

    def __init__(self, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
        )
        blocks = []
        for expansion, base, count, stride, kernel in STAGES:
            outputs = scaled(base, width)
            for position in range(count):
                step = stride if position == 0 else 1
                blocks.append(MBConv(channels, outputs, step, expansion, kernel))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        last = 4 * channels
        self.head = nn.Sequential(
            nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.SiLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(self.dropout(out.mean((2, 3))))
        return logits


def efficientnetb0(num_classes: int = 10, width: float = 1.0, dropout: float = 0.2) -> EfficientNet:
    """EfficientNet-B0 for images of about 32 pixels; `width` multiplies every channel count."""
    return EfficientNet(num_classes, width, dropout)
