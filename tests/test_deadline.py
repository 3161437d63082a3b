"""`Deadline`, on a clock that the tests set."""

from __future__ import annotations

import time

import pytest

from reprune.deadline import NO_END, Deadline
from reprune.errors import TimeLimitError


class Now:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    clock = Now()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_what_has_passed(now: Now) -> None:
    deadline = Deadline(80.0, spent=20.0)
    assert deadline.gone == 0.25
    now.seconds += 40
    assert (deadline.gone, deadline.passed) == (0.75, False)
    deadline.check()
    now.seconds += 40
    assert (deadline.gone, deadline.passed) == (1.0, True)
    with pytest.raises(TimeLimitError, match="the time limit of 80 s has passed"):
        deadline.check()


def test_the_first_part_and_the_rest(now: Now) -> None:
    deadline = Deadline(80.0)
    now.seconds += 20
    first, rest = deadline.part(0.5), deadline.rest()
    assert (first.gone, rest.gone) == (0.5, 0.0)
    now.seconds += 30
    assert (first.passed, rest.gone, rest.rest().gone) == (True, 0.5, 0.0)
    now.seconds += 30
    assert rest.passed
    assert deadline.rest().passed


def test_progress_is_told_before_the_end_is(now: Now) -> None:
    said: list[tuple[str, int, int]] = []

    def tell(phase: str, done: int, total: int, /, **figures: float) -> None:
        said.append((phase, done, total))

    told = Deadline(10.0).watching(tell)
    told("unlearn", 1, 2)
    now.seconds += 10
    with pytest.raises(TimeLimitError):
        told("unlearn", 2, 2)
    assert said == [("unlearn", 1, 2), ("unlearn", 2, 2)]


def test_without_an_end_nothing_passes(now: Now) -> None:
    now.seconds += 1e9
    for deadline in (NO_END, NO_END.part(0.5), NO_END.rest()):
        assert deadline.gone == 0.0
        deadline.check()
