"""Small vocabulary shared by all modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Images = Tensor
"""Pixels: float32, shape (n, c, h, w), range [0, 1]."""

Trigger = Callable[[Tensor], Tensor]
"""A pure function `images -> images` in pixel space; shape, range and dtype are kept."""


class Progress(Protocol):
    """Where long steps report to: `progress("unlearn", done, total, loss=2.1)`.

    `phase` names the step, `done` counts from 0 to `total`; keyword figures are shown as they are.
    """

    def __call__(self, phase: str, done: int, total: int, /, **figures: float) -> None: ...


def silent(phase: str, done: int, total: int, /, **figures: float) -> None:
    """The default `Progress`: says nothing."""
