"""How trigger inversion weighs the size of a mask, and when a class is done."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-5, 1.0


class Rules(Protocol):
    """The settings that matter here; `reprune.detection.Inversion` explains them."""

    @property
    def flip(self) -> float: ...
    @property
    def cost(self) -> float: ...
    @property
    def delay(self) -> bool: ...
    @property
    def smoothing(self) -> float: ...
    @property
    def patience(self) -> int: ...
    @property
    def up(self) -> float: ...
    @property
    def down(self) -> float: ...
    @property
    def settle(self) -> int | None: ...
    @property
    def shrink(self) -> float: ...


class Schedule:
    """Weights, flip rates and smallest sizes of `count` classes, all on the device.

    Attributes:
        weight: `(count,)`, the weight of the mask's size.
        done: `(count,)` bool, classes whose search has ended: settled, or broken.
    """

    def __init__(self, rules: Rules, count: int, device: torch.device) -> None:
        def vector(value: float) -> Tensor:
            return torch.full((count,), value, device=device)

        self._rules = rules
        self.weight = vector(0.0 if rules.delay else rules.cost)
        self.done = vector(0).bool()
        self._broken, self._rose, self._fell = (vector(0).bool() for _ in range(3))
        self._hits, self._total, self._rate = (vector(0.0) for _ in range(3))
        self._ups, self._downs, self._idle = (vector(0.0) for _ in range(3))
        self._best, self._last = vector(torch.inf), vector(torch.inf)
        self._first = True

    def count(self, part: Tensor, hit: Tensor, use: Tensor, loss: Tensor) -> None:
        """Add one step of the classes `part`.

        Args:
            hit: `(k, n)` bool, images that reached the class.
            use: `(k, n)` bool, images of other classes, which count.
            loss: `(k,)`.
        """
        self._hits[part] += (hit & use).sum(1)
        self._total[part] += use.sum(1)
        self._broken[part] |= ~loss.isfinite()

    def check(self, size: Tensor) -> Tensor:
        """Move the weights; true where `size` is the smallest at which the flip rate held."""
        rules = self._rules
        share = 0.0 if self._first else rules.smoothing
        self._first = False
        now = self._hits / self._total.clamp_min(1)
        self._rate = share * self._rate + (1 - share) * now
        self._hits, self._total = torch.zeros_like(self._hits), torch.zeros_like(self._total)
        self.done = self.done | self._broken
        held = self._rate >= rules.flip
        better = held & (now >= rules.flip) & (size < self._best) & ~self.done
        self._best = torch.where(better, size, self._best)

        self._ups = torch.where(held, self._ups + 1, 0)
        self._downs = torch.where(held, 0, self._downs + 1)
        rise, fall = self._ups >= rules.patience, self._downs >= rules.patience
        self._ups, self._downs = self._ups.masked_fill(rise, 0), self._downs.masked_fill(fall, 0)
        waits = self.weight == 0
        self._rose, self._fell = self._rose | (rise & ~waits), self._fell | (fall & ~waits)
        moved = torch.where(rise, self.weight * rules.up, self.weight)
        moved = torch.where(fall, moved / rules.down, moved).clamp(LOWEST, HIGHEST)
        begun = torch.where(rise, rules.cost, 0.0)
        self.weight = torch.where(waits, begun, moved)

        if rules.settle is not None:
            shrank = self._best < rules.shrink * self._last
            self._last = torch.where(shrank, self._best, self._last)
            self._idle = torch.where(shrank | self._best.isinf(), 0, self._idle + 1)
            settled = (self._idle >= rules.settle) & self._rose & self._fell
            self.done = self.done | settled
        return better

    def sizes(self) -> list[float]:
        """The smallest sizes: infinite where none held, NaN where the loss broke."""
        return [float(s) for s in self._best.masked_fill(self._broken, torch.nan).tolist()]
