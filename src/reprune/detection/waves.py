"""Where plain waves lead the images: triggers that nobody optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprune.attacks.sig import sinusoid
from reprune.attacks.trigger import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet, draw
from reprune.errors import ConfigurationError
from reprune.evaluation import predict
from reprune.precision import autocast
from reprune.types import Progress, silent

DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))
"""Of the waves: along rows, along columns, along the diagonals."""

SURE = 1e-3
"""Chances nearer to 0 or 1 than this are taken as that near."""


class Wave(NamedTuple):
    """Periods over the width and over the height of an image."""

    across: int
    down: int

    def stamp(self, shape: tuple[int, int, int], amplitude: float) -> Stamp:
        """The wave, added to images of `shape` (c, h, w)."""
        return Stamp(torch.ones(shape), sinusoid(shape, amplitude, self.across, self.down))


@dataclass(frozen=True, kw_only=True)
class WaveSearch:
    """Settings of `lead_by_waves`.

    Attributes:
        frequencies: periods over an image at most, at least 1.
        amplitude: in pixels of range [0, 1], in (0, 1].
        images: clean images, at most.
    """

    frequencies: int = 16
    amplitude: float = 30 / 255
    images: int = 128

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("frequencies", "images"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.amplitude <= 1:
            raise ConfigurationError(f"amplitude must lie in (0, 1], got {self.amplitude}")

    def passes(self, images: int) -> float:
        """Images through the network, over `images`."""
        return (len(self.waves()) + 1) * min(self.images, images) / images

    def waves(self) -> list[Wave]:
        """All that are tried."""
        periods = range(1, self.frequencies + 1)
        return [Wave(f * across, f * down) for f in periods for across, down in DIRECTIONS]


@dataclass(frozen=True)
class Led:
    """Where each wave leads the images.

    Attributes:
        waves: those that were tried.
        chances: `(waves, classes)`; the mean probability that the model gives a class with a wave,
            over the images that it did not see in that class before.
        amplitude: of the waves.
    """

    waves: tuple[Wave, ...]
    chances: Tensor
    amplitude: float

    @property
    def usable(self) -> bool:
        """Whether all are finite."""
        return bool(self.chances.isfinite().all())

    def best(self, label: int) -> list[int]:
        """The waves, those that lead to a class with the highest chance first."""
        return self.chances[:, label].argsort(descending=True, stable=True).tolist()

    def leader(self) -> tuple[int, float]:
        """The class that waves pull to hardest, and how many times as hard as to the next one.

        A pull is minus the logarithm of the mean probability of all other classes, with the best
        wave.
        """
        pulls = -(1 - self.chances.amax(0)).clamp(SURE, 1 - SURE).log()
        values, labels = pulls.sort(descending=True, stable=True)
        return int(labels[0]), float(values[0] / values[1])


@torch.no_grad()
def lead_by_waves(
    model: Classifier,
    data: ImageSet,
    settings: WaveSearch,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Led:
    """Add each of some sinusoids to clean images, and see where they go.

    Every class has small pictures that lead to it, found by gradients; a trigger that is as large
    as those is not to be told from them by its size. But it is a plain one, and plain pictures
    that were not made for a model lead only some of its images anywhere, unless the model was
    taught so. Waves are the triggers of SIG (Barni et al., 2019).

    Source: this package.

    Args:
        model: the classifier; it is not changed.
        data: clean images.
        settings: see `WaveSearch`.
        generator: draws the images.
        progress: told after each wave.

    Raises:
        ConfigurationError: settings out of their range.
    """
    settings.check()
    few = draw(data, min(settings.images, len(data)), generator)
    pixels, waves, chances = few.pixels(), settings.waves(), []
    with autocast(data.device):
        before = nn.functional.one_hot(predict(model, few).argmax(1), model.num_classes)
        others = 1 - before.float()
        for number, wave in enumerate(waves, 1):
            stamp = wave.stamp(data.shape, settings.amplitude)
            answers = predict(model, ImageSet(stamp(pixels), few.labels)).float().softmax(1)
            chances.append((answers * others).sum(0) / others.sum(0).clamp(min=1))
            progress("waves", number, len(waves))
    return Led(tuple(waves), torch.stack(chances).cpu(), settings.amplitude)
