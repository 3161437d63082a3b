"""`Deadline`: when the time for something has passed."""

from __future__ import annotations

import math
import time

from reprune.errors import TimeLimitError
from reprune.types import Progress


class Deadline:
    """The end of a time that began `spent` seconds ago.

    Args:
        limit: seconds in all; `None` for no end.
        spent: seconds that have passed already.
    """

    def __init__(self, limit: float | None, *, spent: float = 0.0) -> None:
        self.limit = math.inf if limit is None else limit
        self.start = time.monotonic() - spent

    @property
    def gone(self) -> float:
        """The share of the time that has passed, in [0, 1]; without an end 0."""
        spent = time.monotonic() - self.start
        return spent / self.limit if spent < self.limit else 1.0

    @property
    def passed(self) -> bool:
        return self.gone >= 1

    def check(self) -> None:
        """Raises `TimeLimitError` after the end."""
        if self.passed:
            raise TimeLimitError(f"the time limit of {self.limit:g} s has passed")

    def watching(self, progress: Progress) -> Progress:
        """Reports progress, and raises `TimeLimitError` after the end."""

        def told(phase: str, done: int, total: int, /, **figures: float) -> None:
            progress(phase, done, total, **figures)
            self.check()

        return told

    def part(self, share: float) -> Deadline:
        """The end of the first `share` of the whole time."""
        return Deadline(share * self.limit, spent=time.monotonic() - self.start)

    def rest(self) -> Deadline:
        """What is left, from now."""
        return Deadline(self.limit - (time.monotonic() - self.start))


NO_END = Deadline(None)
