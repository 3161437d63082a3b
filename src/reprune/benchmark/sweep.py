"""Many experiments on many workers: resumable, each ends with a record."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from reprune.benchmark.record import Record
from reprune.benchmark.recording import failed
from reprune.benchmark.settings import beginning
from reprune.benchmark.spec import Experiment, by_run
from reprune.benchmark.store import Store
from reprune.errors import ConfigurationError


@dataclass(frozen=True)
class Place:
    """Where a worker finds things: picklable, the same paths on every machine.

    Attributes:
        store: folder of the store; trained models are kept in it.
        data: folder with one folder a data set.
        models: folders of models that somebody else made.
        device: where networks run.
        threads: of a worker on a CPU; `None` leaves torch's choice.
    """

    store: Path
    data: Path | None = None
    models: tuple[Path, ...] = ()
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Batch:
    """Experiments of runs that begin alike (`beginning`); one run may serve several of them."""

    experiments: tuple[Experiment, ...]

    @property
    def key(self) -> str:
        """Of the beginning."""
        return beginning(self.experiments[0]).key

    @property
    def model(self) -> str:
        """Key of the model."""
        return self.experiments[0].model.key

    def runs(self) -> list[Batch]:
        """One batch a run."""
        return [Batch(tuple(served)) for served in by_run(self.experiments)]


class Workers(Protocol):
    """Where batches run. `run` waits for the records and is called by one thread a slot.

    Attributes:
        slots: how many run at once.
        keeps: whether a slot keeps what its last run began with for the next one.
    """

    slots: int
    keeps: bool

    def run(self, slot: int, batch: Batch) -> list[Record]:
        """Raises any exception if the worker died."""

    def close(self) -> None:
        """Stop what runs."""


class Watch(Protocol):
    """Told what happens, from several threads, one at a time."""

    def begun(self, batch: Batch) -> None: ...

    def ended(self, batch: Batch, records: Sequence[Record]) -> None: ...


@dataclass
class Outcome:
    """How many experiments ended how; `elsewhere` are run by another sweep at this moment."""

    done: int = 0
    failed: int = 0
    elsewhere: int = 0


def batches(experiments: Iterable[Experiment]) -> list[Batch]:
    """Experiments by how their runs begin, each once: all first draws, then the second ones."""
    found: dict[str, dict[str, Experiment]] = {}
    for experiment in sorted(experiments, key=lambda e: e.draw):
        found.setdefault(beginning(experiment).key, {})[experiment.key] = experiment
    return [Batch(tuple(group.values())) for group in found.values()]


def missing(
    todo: Iterable[Batch], records: dict[str, Record], *, retry: bool = False
) -> list[Batch]:
    """What has no record yet; with `retry` also what failed."""
    left = []
    for batch in todo:
        rest = tuple(e for e in batch.experiments if not _ended(records.get(e.key), retry))
        if rest:
            left.append(Batch(rest))
    return left


def _ended(record: Record | None, retry: bool) -> bool:
    return record is not None and not (retry and record.status == "failed")


def shard(todo: Sequence[Batch], text: str) -> list[Batch]:
    """The part `i/n` of the batches, i from 0: by their keys, so that it never depends on the rest.

    Raises:
        ConfigurationError: not of that form.
    """
    head, slash, tail = text.partition("/")
    if not (slash and head.isdigit() and tail.isdigit() and int(head) < int(tail)):
        raise ConfigurationError(f"a shard is i/n with 0 <= i < n, such as 0/4; got {text!r}")
    return [batch for batch in todo if int(batch.key, 16) % int(tail) == int(head)]


def estimate(todo: Iterable[Batch], records: dict[str, Record]) -> tuple[float, int]:
    """Seconds of methods that the batches will take, and for how many batches nothing is known.

    The median of the recorded runs of the same method, on the same architecture and width where
    there are any. Training of models is not counted; what runs begin with is counted with each.
    """
    same: dict[tuple[object, ...], list[float]] = {}
    for record in records.values():
        if record.seconds is not None:
            spec = record.experiment
            for key in _likeness(spec):
                same.setdefault(key, []).append(record.seconds)
    total, unknown = 0.0, 0
    for batch in todo:
        known = [same[key] for key in _likeness(batch.experiments[0]) if key in same]
        runs = len({e.run.key for e in batch.experiments})
        total += runs * median(known[0]) if known else 0.0
        unknown += not known and batch.experiments[0].method != "none"
    return total, unknown


def _likeness(spec: Experiment) -> list[tuple[object, ...]]:
    return [(spec.method, spec.model.arch, spec.model.width), (spec.method,)]


@dataclass
class _Queue:
    """Batches to be taken; those of a model that another worker is making come last."""

    todo: list[Batch]
    models: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: list[Batch] = field(default_factory=list)

    def take(self) -> Batch | None:
        with self.lock:
            if not self.todo:
                return None
            making = {b.model for b in self.running if not self._there(b)}
            free = (i for i, b in enumerate(self.todo) if b.model not in making)
            batch = self.todo.pop(next(free, 0))
            self.running.append(batch)
            return batch

    def end(self, batch: Batch) -> None:
        with self.lock:
            self.running.remove(batch)

    def stop(self) -> None:
        with self.lock:
            self.todo.clear()

    def _there(self, batch: Batch) -> bool:
        given = batch.experiments[0].model.source is not None
        return given or (self.models / batch.model / "card.json").exists()


def sweep(
    todo: Sequence[Batch],
    store: Store,
    workers: Workers,
    *,
    watch: Watch,
    device: str = "cpu",
    retry: bool = False,
) -> Outcome:
    """Run batches on all workers and keep their records.

    Where workers keep what runs begin with, each run of a batch is recorded as it ends. A worker
    that dies leaves failed records: of the run, or of the whole batch if it was the first one. What
    another sweep on the same store finished meanwhile is not run again, what it is running is left
    to it.

    Args:
        todo: what to run.
        store: where records go.
        workers: where it runs; closed in the end.
        watch: told what happens.
        device: for the records of workers that died.
        retry: whether failed experiments are run again.

    Raises:
        OutputError: a record cannot be written.
    """
    queue, outcome, writing = _Queue(list(todo), store.models), Outcome(), threading.Lock()

    def work(slot: int) -> None:
        while (batch := queue.take()) is not None:
            try:
                one(slot, batch)
            finally:
                queue.end(batch)

    def one(slot: int, batch: Batch) -> None:
        with ExitStack() as claims:
            ours = tuple(e for e in batch.experiments if claims.enter_context(store.claim(e.key)))
            outcome.elsewhere += len(batch.experiments) - len(ours)
            left = missing([Batch(ours)], store.records(), retry=retry) if ours else []
            if not left:
                return
            (whole,) = left
            with writing:
                watch.begun(whole)
            every: list[Record] = []
            rest = whole.runs() if workers.keeps else [whole]
            while rest:
                part = rest.pop(0)
                try:
                    records = workers.run(slot, part)
                except Stopped:
                    return
                except Exception as error:
                    if not every:
                        part, rest = whole, []  # all would begin like the first
                    records = [failed(e, error, device) for e in part.experiments]
                every += records
                with writing:
                    store.add(records)
                    bad = sum(record.status == "failed" for record in records)
                    outcome.failed += bad
                    outcome.done += len(records) - bad
            with writing:
                watch.ended(whole, every)

    try:
        with ThreadPoolExecutor(workers.slots) as threads:
            jobs = [threads.submit(work, slot) for slot in range(workers.slots)]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                queue.stop()
                workers.close()
                raise
    finally:
        workers.close()
    return outcome


class Stopped(Exception):
    """The sweep was interrupted while this batch ran: it leaves no record."""
