"""A cluster of two nodes on this machine, of which one is lost in the middle of a sweep."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reprune.benchmark.catalog import table
from reprune.benchmark.cluster import RayWorkers
from reprune.benchmark.store import Store
from reprune.benchmark.sweep import Place
from reprune.errors import ConfigurationError

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'reprune[ray]'")
pytestmark = pytest.mark.slow


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Cluster:
    """`ray start` twice on the loopback."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets need a short path
        self.address = f"127.0.0.1:{_free_port()}"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": self.folder}
        port = self.address.partition(":")[2]
        self.head = self._start(
            *("--head", f"--port={port}", "--include-dashboard=false"),
            *("--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}"),
        )
        self._wait(1)
        self.other = self._start(f"--address={self.address}", "--node-ip-address=127.0.0.1")
        self._wait(2)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        program = Path(sys.executable).with_name("ray")
        return subprocess.Popen(
            [program, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def nodes(self) -> int:
        """How many are alive, asked from another process."""
        code = (
            "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, "
            "logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.address],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else 0

    def _wait(self, count: int) -> None:
        for _ in range(60):
            if self.nodes() >= count:
                return
            time.sleep(1)
        raise RuntimeError(f"no cluster of {count} nodes came up")

    def lose_a_node(self) -> None:
        os.killpg(self.other.pid, signal.SIGKILL)
        self.other.wait()

    def stop(self) -> None:
        for node in (self.other, self.head):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    yield found
    found.stop()


def test_a_lost_node_costs_no_experiment(cluster: Cluster, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-m", "reprune", "bench", "run", "smoke", "--store", str(store)]
    command += ["--ray-address", cluster.address, "--device", "cpu", "--threads", "1"]
    with subprocess.Popen(
        command,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        for _ in range(2400):
            if len(Store(store).records()) >= 3 or run.poll() is not None:
                break
            time.sleep(0.1)
        assert run.poll() is None
        cluster.lose_a_node()
        output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    records = Store(store).records()
    assert set(records) == {e.key for e in table("smoke", "small").experiments()}
    assert {r.status for r in records.values()} == {"done"}
    assert cluster.nodes() == 1


def test_no_cluster_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Ray cluster at"):
        RayWorkers(Place(store=tmp_path), f"127.0.0.1:{_free_port()}")
