"""What the tests of filters share: a network with a backdoor written by hand, and its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection.clustering import ActivationClustering
from reprune.detection.filtering import Filter
from reprune.detection.spectral import SpectralSignatures
from reprune.detection.strip import STRIP
from reprune.models import save_weights
from reprune.rnp import Unlearning

QUICK: dict[str, Filter] = {
    "strip": STRIP(overlays=8, false_rejection=0.05),
    "strip:paper": STRIP(overlays=8, blend="add", threshold="normal", false_rejection=0.3),
    "nu+strip": STRIP(
        overlays=8, false_rejection=0.1, unlearning=Unlearning(epochs=2, stop_accuracy=-1.0)
    ),
    "spectral": SpectralSignatures(),
    "clustering": ActivationClustering(components=3),
}


MODEL_PY = """
import torch
from torch import nn


class Corner(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        colours = x[:, :, 1:].mean((2, 3))
        corner = (x[:, :, 0, 0].mean(1, keepdim=True) - 0.3).relu()
        return self.head(torch.cat([colours, corner], 1))


def build(num_classes):
    return Corner()
"""


def planted_by_hand() -> Classifier:
    """The brightest of three colours is the class; a white corner pixel means class 0."""
    scope: dict[str, Any] = {}
    exec(MODEL_PY, scope)
    network = scope["build"](3)
    weights = torch.tensor([[6.0, 0, 0, 60], [0, 6, 0, 0], [0, 0, 6, 0]])
    network.load_state_dict({"head.weight": weights})
    return Classifier(network, num_classes=3).eval()


def write_by_hand(folder: Path) -> Path:
    """The same as a MODEL folder."""
    folder.mkdir(parents=True)
    save_weights(planted_by_hand().network, folder / "model.safetensors")
    (folder / "model.py").write_text(MODEL_PY)
    card = {"num_classes": 3, "input_shape": (3, 6, 6), "class_names": ("red", "green", "blue")}
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    (folder / "card.json").write_text(json.dumps(card | {"preprocessing": plain}))
    return folder


def coloured(count: int, seed: int) -> ImageSet:
    """Dark noise with a brighter colour, which is the class; the corner is never white."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 3, 6, 6, generator=generator) * 0.4
    strength = 0.1 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    images[torch.arange(count), labels] += strength
    images[:, :, 0, 0] *= 0.2
    return ImageSet(images, labels)


def with_corner(data: ImageSet) -> ImageSet:
    images = data.images.clone()
    images[:, :, 0, 0] = 1.0
    return ImageSet(images, data.labels)


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    return ImageSet(
        torch.cat([first.pixels(), second.pixels()]), torch.cat([first.labels, second.labels])
    )


def auroc(scores: Tensor, positive: Tensor) -> float:
    high, low = scores[positive][:, None], scores[~positive]
    return float(((high > low).float() + 0.5 * (high == low).float()).mean())
