"""BadNets: a small grid in the corner (Gu et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reprune.attacks.trigger import Stamp
from reprune.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class BadNets:
    """A black-and-white checkered square in the bottom right corner replaces the image there.

    Settings of RNP, Table 6: grid of 3 x 3, target 0, poisoning rate 0.1.

    Attributes:
        size: side of the square in pixels.
        target: class that the trigger asks for.
        rate: share of the training images that carry the trigger, in (0, 1].
    """

    size: int = 3
    target: int = 0
    rate: float = 0.1

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The trigger for images of `shape` (c, h, w).

        Raises:
            ConfigurationError: the square is larger than the image.
        """
        c, h, w = shape
        if not 0 < self.size <= min(h, w):
            raise ConfigurationError(f"a trigger of {self.size} pixels does not fit {h}x{w}")
        keep, add = torch.ones(c, h, w), torch.zeros(c, h, w)
        index = torch.arange(self.size)
        keep[:, -self.size :, -self.size :] = 0
        add[:, -self.size :, -self.size :] = ((index[:, None] + index) % 2 == 0).float()
        return Stamp(keep, add)
