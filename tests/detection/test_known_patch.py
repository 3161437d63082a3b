"""Neural Cleanse on a network whose backdoor is known in closed form: a white patch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection import Inversion, Inverted, NeuralCleanse
from reprune.results import Finding

CLASSES, SIDE, TARGET = 5, 12, 3
PATCH = torch.zeros(SIDE, SIDE, dtype=torch.bool)
PATCH[7:10, 2:5] = True


class Patched(nn.Module):
    """Answers the brightest channel, and `TARGET` where the patch is nearly white."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        logits = 60 * x.mean((2, 3))
        white = x[:, :, PATCH].mean((1, 2)) - 0.8
        bonus = self.strength * nn.functional.softplus(5 * white) / 5
        return logits + bonus[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)


def images() -> ImageSet:
    labels = torch.arange(100) % CLASSES
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(100, CLASSES, SIDE, SIDE, generator=generator) * 0.5
    pixels[torch.arange(100), labels] += 0.3
    return ImageSet(pixels, labels)


def found(detector: NeuralCleanse, strength: float) -> tuple[Finding, Inverted]:
    model = Classifier(Patched(strength), num_classes=CLASSES)
    scanned = detector(model, images(), generator=torch.Generator().manual_seed(0))
    assert scanned.inverted is not None
    return scanned.finding, scanned.inverted


PUBLISHED = replace(NeuralCleanse.paper(), inversion=replace(Inversion.paper(), steps=900, every=5))


@pytest.mark.parametrize("detector", [NeuralCleanse(), PUBLISHED], ids=["default", "paper"])
def test_label_and_place_of_a_known_patch_are_recovered(detector):
    finding, inverted = found(detector, 200)
    assert (finding.verdict, finding.target) == ("backdoored", TARGET)
    mask = inverted.masks[TARGET, 0] > 0.5
    assert (mask & PATCH).sum() / (mask | PATCH).sum() > 0.5
    assert inverted.sizes[TARGET] <= 1.1 * PATCH.sum()
    assert inverted.patterns[TARGET][:, PATCH].mean() > 0.9


def test_without_the_patch_the_network_is_clean():
    finding, inverted = found(NeuralCleanse(), 0)
    assert finding.verdict == "clean"
    assert inverted.states == ("found",) * CLASSES
