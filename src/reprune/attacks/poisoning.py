"""Poisoning a training set, and triggering a test set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.attacks.badnets import BadNets
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.types import Trigger


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set and which of its rows were poisoned (`(n,)` bool)."""

    data: ImageSet
    poisoned: Tensor


def _apply(data: ImageSet, index: Tensor, trigger: Trigger) -> Tensor:
    pixels = trigger(data.pixels(index))
    return pixels.mul(255).round().byte() if data.images.dtype == torch.uint8 else pixels


def poison(data: ImageSet, attack: BadNets, generator: torch.Generator) -> Poisoned:
    """Put the trigger on `round(rate * n)` images drawn at random and give them the target label.

    Images of the target class are drawn like the others, as in the published recipe.

    Raises:
        ConfigurationError: a rate outside (0, 1] or too small to poison one image, or a target that
            is no class index.
    """
    if not 0 < attack.rate <= 1:
        raise ConfigurationError(f"the poisoning rate must lie in (0, 1], got {attack.rate}")
    if attack.target < 0 or (data.class_names and attack.target >= len(data.class_names)):
        known = f" in 0..{len(data.class_names) - 1}" if data.class_names else ""
        raise ConfigurationError(f"the target must be a class index{known}, got {attack.target}")
    count = round(attack.rate * len(data))
    if count == 0:
        raise ConfigurationError(
            f"a poisoning rate of {attack.rate} poisons none of {len(data)} images; raise the rate"
        )
    index = torch.randperm(len(data), generator=generator)[:count].to(data.device)
    images, labels = data.images.clone(), data.labels.clone()
    images[index] = _apply(data, index, attack.trigger(data.shape))
    labels[index] = attack.target
    poisoned = torch.zeros(len(data), dtype=torch.bool, device=data.device)
    poisoned[index] = True
    return Poisoned(ImageSet(images, labels, data.class_names), poisoned)


def triggered(data: ImageSet, trigger: Trigger, target: int) -> ImageSet:
    """The images not of class `target`, with the trigger; labels stay the true ones."""
    index = (data.labels != target).nonzero().flatten()
    return ImageSet(_apply(data, index, trigger), data.labels[index], data.class_names)
