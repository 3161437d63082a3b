"""Blend: a picture of random pixels mixed into the image (Chen et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Setup
from reprune.attacks.poisoning import Poisoned
from reprune.attacks.stamping import StampingAttack
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet
from reprune.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Blend(StampingAttack):
    r"""`x -> (1 - alpha) x + alpha p` with a pattern `p` of uniformly random pixels.

    Settings of RNP, Table 6: random pixels, target 0, poisoning rate 0.1. A choice, for the table
    leaves it open: alpha 0.2, which Chen et al. use.

    Attributes:
        alpha: share of the pattern in poisoned training images, in (0, 1].
        test_alpha: share of the pattern in the attacker's images after training; `alpha` by
            default, 0.1 in some published evaluations.
        pattern_seed: seed of the pattern, which is part of the attack.
    """

    title: ClassVar[str] = "Blend"
    source_paper: ClassVar[str] = "Chen et al., 2017"

    alpha: float = 0.2
    test_alpha: float | None = None
    pattern_seed: int = 0

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The trigger of the poisoned training images of `shape` (c, h, w).

        Raises:
            ConfigurationError: an alpha outside (0, 1].
        """
        return blended(random_pixels(shape, self.pattern_seed), self.alpha)

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        if self.test_alpha is not None:
            replace(self, alpha=self.test_alpha).trigger(data.shape)

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        poisoned = super()._poison(data, setup, num_classes)
        if self.test_alpha is None:
            return poisoned
        pattern = random_pixels(data.shape, self.pattern_seed)
        return replace(poisoned, trigger=blended(pattern, self.test_alpha))


def random_pixels(shape: tuple[int, int, int], seed: int) -> Tensor:
    """Uniformly random pixels `(c, h, w)` in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def blended(pattern: Tensor, alpha: float) -> Stamp:
    """`x -> (1 - alpha) x + alpha pattern`, for a pattern `(c, h, w)` in [0, 1].

    Raises:
        ConfigurationError: an alpha outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ConfigurationError(f"alpha must lie in (0, 1], got {alpha}")
    return Stamp(torch.full_like(pattern, 1 - alpha), alpha * pattern)
