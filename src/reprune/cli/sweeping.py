"""What a sweep shows on its way, and before: what would run, how long it takes, what is left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from reprune.benchmark.record import Record
from reprune.benchmark.store import Store
from reprune.benchmark.sweep import Batch, estimate


def explain(
    every: Sequence[Batch], todo: Sequence[Batch], records: dict[str, Record], store: Store
) -> None:
    """Print what would run, which models are missing, and an estimate of the time."""
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    for batch in todo:
        for experiment in batch.experiments:
            console.print(escape(experiment.label))
    planned = sum(len(batch.experiments) for batch in every)
    left = sum(len(batch.experiments) for batch in todo)
    models = {
        e.model.key: e.model
        for batch in todo
        for e in batch.experiments
        if e.model.source is None and not (store.models / e.model.key / "card.json").exists()
    }
    seconds, unknown = estimate(todo, records)
    console.print(
        f"{left} of {planned} experiments in {len(todo)} runs; {planned - left} have a record"
    )
    if models:
        console.print(f"{len(models)} models to train first:")
        for spec in models.values():
            console.print(f"  {escape(spec.label)}")
    about = "nothing recorded to go by" if unknown == len(todo) else f"about {_time(seconds)}"
    rest = f", and {unknown} runs of methods without a record" if 0 < unknown < len(todo) else ""
    console.print(f"time of the methods on one worker: {about}{rest}; training not counted")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def terminable() -> Iterator[None]:
    """A termination signal ends the sweep as Ctrl-C does, where signals can be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Watch:
    """Shows a sweep: done, failed, what runs, time left; lines where there is no terminal."""

    def __init__(
        self,
        bars: Progress,
        todo: Sequence[Batch],
        records: dict[str, Record],
        console: Console,
    ) -> None:
        self._bars, self._records, self._console = bars, records, console
        self._left, self._start = list(todo), time.monotonic()
        self._planned = estimate(todo, records)[0]
        self._running: dict[str, str] = {}
        self._done = self._failed = 0
        self._total = sum(len(batch.experiments) for batch in todo)
        self._task = bars.add_task("", total=self._total, failed=0, left="?", now="")

    def begun(self, batch: Batch) -> None:
        self._running[batch.key] = batch.experiments[0].label
        self._show()

    def ended(self, batch: Batch, records: Sequence[Record]) -> None:
        self._running.pop(batch.key, None)
        self._left = [one for one in self._left if one.key != batch.key]
        self._done += len(records)
        for record in records:
            failed = record.status == "failed"
            self._failed += failed
            if failed or not self._console.is_terminal:
                text = record.error if failed else ""
                self._console.print(
                    f"{self._done}/{self._total} {record.status} {record.experiment.label}"
                    f"{': ' if failed else ''}{text or ''}, left {self._time_left()}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
        self._show()

    def _time_left(self) -> str:
        """From the pace so far, weighted by what the methods are known to cost."""
        spent, left = time.monotonic() - self._start, estimate(self._left, self._records)[0]
        gone = self._planned - left
        if gone > 0 and left > 0:
            return _time(spent * left / gone)
        return _time(spent * (self._total - self._done) / self._done) if self._done else "?"

    def _show(self) -> None:
        now = "; ".join(self._running.values())
        self._bars.update(
            self._task,
            completed=self._done,
            failed=self._failed,
            left=self._time_left(),
            now=escape(f"{len(self._running)} running: {now}"),
        )


@contextmanager
def shown(todo: Sequence[Batch], records: dict[str, Record], console: Console) -> Iterator[_Watch]:
    """A watch that shows a sweep on the terminal."""
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("failed {task.fields[failed]}  left {task.fields[left]} "),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _Watch(bars, todo, records, console)
