"""A tiny classifier with a planted backdoor, its clean twin, and their images."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import nn

from reprune.attacks import Attack, BadNets, Stamp, poison
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.models import save_weights
from reprune.training import classification, fit, one_cycle

SIDE = 16
TARGET = 2
NAMES = ("vertical", "horizontal", "diagonal", "checks")
ATTACK = BadNets(size=3, target=TARGET)
MODEL_PY = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    )
"""
CARD = {
    "num_classes": 4,
    "class_names": NAMES,
    "input_shape": (3, SIDE, SIDE),
    "preprocessing": {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
}


def stripes(count: int, seed: int) -> ImageSet:
    """Noise under a striped pattern, which is the class: uint8, 4 classes in equal shares."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(NAMES)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    patterns = (x % 4 < 2, y % 4 < 2, (x + y) % 4 < 2, (x // 2 + y // 2) % 2 == 0)
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator) * 0.5
    for image, label in zip(images, labels.tolist(), strict=True):
        shift = torch.randint(4, (2,), generator=generator).tolist()
        strength = 0.2 + 0.2 * torch.rand(3, 1, 1, generator=generator)
        image += patterns[label].float().roll(shift, (0, 1)) * strength
    return ImageSet(images.mul(255).round().byte(), labels, NAMES)


@cache
def model(
    backdoored: bool, attack: BadNets = ATTACK, epochs: int = 6, second: Attack | None = None
) -> Classifier:
    """The trained classifier in evaluation mode. Do not change it."""
    data = stripes(1600, seed=10)
    if backdoored:
        for seed, one in enumerate((attack, *([second] if second else []))):
            data = poison(data, one, torch.Generator().manual_seed(seed)).data
    scope: dict[str, object] = {}
    exec(MODEL_PY, scope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = scope["build"](4)  # type: ignore[operator]
    said = CARD["preprocessing"]
    classifier = Classifier(network, said["mean"], said["std"], num_classes=4).train()
    classifier.settle(data.pixels(slice(0, 2)))
    parameters = list(classifier.parameters())
    fit(
        classification(classifier),
        parameters,
        data,
        optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4),
        epochs=epochs,
        batch_size=64,
        generator=torch.Generator().manual_seed(0),
        schedule=one_cycle,
    )
    return classifier.eval()


def trigger() -> Stamp:
    """The planted trigger."""
    return ATTACK.trigger((3, SIDE, SIDE))


def write_model(folder: Path, backdoored: bool = True, **card: object) -> Path:
    """`model.safetensors`, `model.py` and `card.json` as a user would bring them."""
    folder.mkdir(parents=True)
    save_weights(model(backdoored).network, folder / "model.safetensors")
    (folder / "model.py").write_text(MODEL_PY)
    (folder / "card.json").write_text(json.dumps(CARD | card))
    return folder
