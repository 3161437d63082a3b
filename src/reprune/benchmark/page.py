"""Stand-in until the leaderboard page lands."""

from __future__ import annotations

from collections.abc import Iterable

from reprune.benchmark.record import Record


def leaderboard(records: Iterable[Record]) -> str:
    """The page."""
    raise NotImplementedError
