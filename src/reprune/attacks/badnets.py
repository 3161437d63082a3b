"""BadNets: a small grid in the corner (Gu et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reprune.attacks.stamping import StampingAttack
from reprune.attacks.trigger import Stamp
from reprune.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class BadNets(StampingAttack):
    """A black-and-white checkered square in the bottom right corner replaces the image there.

    Settings of RNP, Table 6: a grid, target 0, poisoning rate 0.1; its size, 3 x 3 here, is left
    open there, and 3, 5 and 10 in Table 11.

    Attributes:
        size: side of the square in pixels.
    """

    title: ClassVar[str] = "BadNets"
    source_paper: ClassVar[str] = "Gu et al., 2017"

    size: int = 3

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The trigger for images of `shape` (c, h, w).

        Raises:
            ConfigurationError: the square is larger than the image.
        """
        return grid(self.size, shape)


def grid(size: int, shape: tuple[int, int, int]) -> Stamp:
    """A checkered square of `size` pixels in the bottom right corner.

    Raises:
        ConfigurationError: it is larger than the image.
    """
    c, h, w = shape
    if not 0 < size <= min(h, w):
        raise ConfigurationError(f"a trigger of {size} pixels does not fit {h}x{w}")
    keep, add = torch.ones(c, h, w), torch.zeros(c, h, w)
    index = torch.arange(size)
    keep[:, -size:, -size:] = 0
    add[:, -size:, -size:] = ((index[:, None] + index) % 2 == 0).float()
    return Stamp(keep, add)
