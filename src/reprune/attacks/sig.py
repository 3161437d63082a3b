"""SIG: a sinusoid over images of the target class (Barni et al., 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Setup
from reprune.attacks.goal import stamped
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, replaced
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet
from reprune.errors import ConfigurationError


def sinusoid(
    shape: tuple[int, int, int], amplitude: float, across: float, down: float = 0.0
) -> Tensor:
    """A sine wave `(c, h, w)` of so many periods over the width and over the height."""
    row = torch.arange(shape[1], dtype=torch.float64)[:, None]
    column = torch.arange(shape[2], dtype=torch.float64)
    phase = column * across / shape[2] + row * down / shape[1]
    return (amplitude * torch.sin(2 * math.pi * phase)).float().expand(shape).contiguous()


@dataclass(frozen=True, kw_only=True)
class SIG(PoisoningAttack):
    r"""Clean-label: `x[.., j] -> x[.., j] + delta sin(2 pi j f / w)`, `j` counting columns.

    Barni et al., 2019, equation 1. Settings of RNP, Table 6: target 0, and a poisoning rate of 0.08
    of all images, every one of them of the target class. Choices, where that table says
    "Sinusoidal Signal" alone: frequency 6, which Barni et al. use, and delta 20/255.

    Attributes:
        delta: amplitude in pixel units, in (0, 1].
        frequency: periods over the width of the image.
        test_delta: amplitude in the attacker's images after training; `delta` by default.
    """

    title: ClassVar[str] = "SIG"
    source_paper: ClassVar[str] = "Barni et al., 2019"
    clean_label: ClassVar[bool] = True

    rate: float = 0.08
    delta: float = 20 / 255
    frequency: float = 6.0
    test_delta: float | None = None

    def trigger(self, shape: tuple[int, int, int], delta: float | None = None) -> Stamp:
        """The sinusoid for images of `shape` (c, h, w), of amplitude `delta`.

        Raises:
            ConfigurationError: an amplitude outside (0, 1], or a frequency that is not positive.
        """
        delta = self.delta if delta is None else delta
        if not 0 < delta <= 1:
            raise ConfigurationError(f"delta must lie in (0, 1] (20/255, not 20), got {delta}")
        if not 0 < self.frequency < math.inf:
            raise ConfigurationError(f"the frequency must be positive, got {self.frequency}")
        return Stamp(torch.ones(shape), sinusoid(shape, delta, self.frequency))

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        self.trigger(data.shape)
        self.trigger(data.shape, self.test_delta)

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        index = self._draw(data, setup.generator)
        changed, rows = replaced(data, index, stamped(data, index, self.trigger(data.shape)))
        return Poisoned(changed, rows, self.trigger(data.shape, self.test_delta))
