"""Workers on this machine: one process each, which may die without harm to the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch

from reprune.benchmark.extra import needed
from reprune.benchmark.record import Record
from reprune.benchmark.run import run
from reprune.benchmark.subjects import Subjects
from reprune.benchmark.sweep import Batch, Place, Stopped
from reprune.errors import RepruneError


class WorkerDied(RepruneError, RuntimeError):
    """A worker ended in the middle of an experiment: out of memory, killed, or a crash."""


class LocalWorkers:
    """One process for each device; on a CPU as many as asked for.

    A process keeps what its last run began with.

    Args:
        place: where workers find things.
        devices: one a worker, such as `("cuda:0", "cuda:1")` or `("cpu", "cpu")`.
    """

    keeps = True

    def __init__(self, place: Place, devices: Sequence[str]) -> None:
        self.slots = len(devices)
        self._places = [replace(place, device=device) for device in devices]
        self._pools = [self._new(one) for one in self._places]
        self._closed = False

    def _new(self, place: Place) -> Any:
        return needed("pebble").ProcessPool(
            max_workers=1,
            context=get_context("spawn"),
            initializer=_begin,
            initargs=(os.getpid(), place),
        )

    def run(self, slot: int, batch: Batch) -> list[Record]:
        """The records of a batch.

        Raises:
            WorkerDied: the process ended; the next batch gets a new one.
            Stopped: `close` was called.
        """
        place = self._places[slot]
        try:
            future = self._pools[slot].schedule(work, args=(place, batch))
            while not wait([future], timeout=1).done:  # a stopped pool may leave it so
                if self._closed:
                    raise Stopped
            records: list[Record] = future.result()
        except (CancelledError, RuntimeError, OSError) as error:
            if self._closed:
                raise Stopped from error
            self._pools[slot].stop()
            self._pools[slot] = self._new(place)
            code = getattr(error, "exitcode", None)
            how = f"with exit code {code}" if code is not None else f"({error})"
            raise WorkerDied(f"the worker ended {how}") from error
        return records

    def close(self) -> None:
        """End all processes."""
        self._closed = True
        for pool in self._pools:
            pool.stop()
        for pool in self._pools:
            pool.join()


def work(place: Place, batch: Batch) -> list[Record]:
    """Run a batch in this process; models and images stay in memory for the next one."""
    if place.threads is not None and place.device == "cpu":
        torch.set_num_threads(place.threads)
    return run(batch.experiments, subjects(place))


@cache
def subjects(place: Place) -> Subjects:
    """The models and images of this process."""
    return Subjects(place.data, place.store / "models", place.models, place.device)


def _begin(parent: int, place: Place) -> None:
    """Ends the process with its parent, whatever killed that; Ctrl-C is the parent's to handle."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def devices(name: str, workers: int | None) -> tuple[str, ...]:
    """The devices of the workers: every GPU, or one CPU; `workers` processes if that is given."""
    count = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    every: tuple[Any, ...] = tuple(f"cuda:{i}" for i in range(count)) or (
        ("cpu",) if name == "auto" else (name,)
    )
    return tuple(every[i % len(every)] for i in range(workers or len(every)))
