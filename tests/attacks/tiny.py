"""Every attack with parameters that take seconds on striped images of 16 pixels."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from planted import TARGET, model, stripes
from reprune.attacks import ATTACKS, Attack
from reprune.data import ImageSet

TINY: dict[str, dict[str, object]] = {name: {} for name in ATTACKS} | {
    "trojan": {"steps": 5},
    "dynamic": {"width": 8},
    "wanet": {"strength": 2.0},
    "dfst": {"generator_images": 100, "generator_epochs": 1, "width": 8},
    "lira": {"eps": 0.1, "generator_lr": 0.01, "width": 8},
}
"""Parameters besides the target, by name; what is not said keeps its default."""


def tiny(name: str, **changes: object) -> Attack:
    """The attack `name` in its tiny form."""
    attack = ATTACKS[name]
    target = {"target": TARGET} if "target" in attack.__dataclass_fields__ else {}
    return attack(**{**target, **TINY[name], **changes})


@cache
def images() -> ImageSet:
    """200 images of 4 classes."""
    return stripes(200, seed=0)


@cache
def surrogate():
    """A clean classifier of these images. Do not change it."""
    return model(backdoored=False)


class Recording(nn.Module):
    """Keeps the images of every call in training mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(images.detach().clone())
        return self.inner(images)
