"""Workers on a Ray cluster."""

from __future__ import annotations

import os
import socket
from typing import Any

from reprune.benchmark.extra import needed
from reprune.benchmark.local import WorkerDied, work
from reprune.benchmark.record import Record
from reprune.benchmark.sweep import Batch, Place, Stopped
from reprune.errors import ConfigurationError

RETRIES = 3
"""How often a batch is run again on another node when its node is lost."""


class RayWorkers:
    """Tasks of a Ray cluster whose machines see the same store, data and models at the same paths.

    Args:
        place: where workers find things; with a CUDA device each task gets one GPU.
        address: of the cluster, as `ray.init` takes it: `auto`, `HOST:PORT`.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigurationError: no cluster at that address, or none with what a task needs.
    """

    keeps = False

    def __init__(self, place: Place, address: str) -> None:
        self._ray = needed("ray")
        self._place = place
        self._running: dict[int, Any] = {}
        self._closed = False
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            _reach(address)
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"no Ray cluster at {address!r}: {error}") from error
        gpu = place.device.startswith("cuda")
        needs: dict[str, float] = {"num_cpus": place.threads or 1, "num_gpus": int(gpu)}
        there = self._ray.cluster_resources()
        kind, each = ("GPU", 1) if gpu else ("CPU", needs["num_cpus"])
        self.slots = int(there.get(kind, 0) // each)
        if not self.slots:
            self._ray.shutdown()
            raise ConfigurationError(
                f"the cluster at {address!r} has {there.get(kind, 0):g} {kind}s, a task needs "
                f"{each:g}"
            )
        self._task = self._ray.remote(max_retries=RETRIES, **needs)(work)

    def run(self, slot: int, batch: Batch) -> list[Record]:
        """The records of a batch, from whichever node ran it.

        Raises:
            WorkerDied: its node was lost, and those of the retries.
            Stopped: `close` was called.
        """
        self._running[slot] = self._task.remote(self._place, batch)
        try:
            records: list[Record] = self._ray.get(self._running[slot])
        except Exception as error:
            if self._closed:
                raise Stopped from error
            if isinstance(error, self._ray.exceptions.RayError):
                raise WorkerDied(f"lost on the cluster: {error}") from error
            raise
        return records

    def close(self) -> None:
        """Cancel what runs and leave the cluster."""
        if self._closed:
            return
        self._closed = True
        for task in self._running.values():
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens; Ray itself would end the process after a minute."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()
