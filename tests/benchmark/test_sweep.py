"""Sweeps: every experiment ends with a record, none is run twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from reprune.benchmark.local import LocalWorkers, WorkerDied, devices
from reprune.benchmark.record import Record
from reprune.benchmark.settings import model_digest, settings_digest
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.benchmark.store import Store
from reprune.benchmark.sweep import (
    Batch,
    Place,
    Stopped,
    Workers,
    batches,
    estimate,
    missing,
    shard,
    sweep,
)
from reprune.errors import ConfigurationError

MODEL = ModelSpec(attack="badnets", width=16, source="zoo:badnets")
EXPERIMENTS = [
    Experiment(model=MODEL, method=method, draw=draw, seed=draw)
    for draw in range(3)
    for method in ("rnp", "anp", "ft")
]


class Watch:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.begins: list[str] = []
        self.ends: list[str] = []

    def begun(self, batch: Batch) -> None:
        self.begins.append(batch.key)

    def ended(self, batch: Batch, records: Sequence[Record]) -> None:
        self.ends.append(batch.key)


class Fake(Workers):
    """Workers that do nothing, die on request, and remember."""

    def __init__(
        self, slots: int = 2, dies: str = "", seconds: float = 0.0, keeps: bool = True
    ) -> None:
        self.slots, self.dies, self.seconds, self.keeps = slots, dies, seconds, keeps
        self.ran: list[str] = []
        self.calls = 0
        self.closed = False
        self.busy: list[tuple[str, str]] = []

    def run(self, slot: int, batch: Batch) -> list[Record]:
        time.sleep(self.seconds)
        self.calls += 1
        self.ran += [e.key for e in batch.experiments]
        if batch.experiments[0].method == self.dies:
            raise WorkerDied("the worker ended with exit code -9")
        return [Record(key=e.key, experiment=e, status="done") for e in batch.experiments]

    def close(self) -> None:
        self.closed = True


def test_every_experiment_ends_with_a_record(tmp_path: Path) -> None:
    store, crew, watch = Store(tmp_path), Fake(dies="anp"), Watch()
    outcome = sweep(batches(EXPERIMENTS), store, crew, watch=watch)
    records = store.records()
    assert set(records) == {e.key for e in EXPERIMENTS}
    assert (outcome.done, outcome.failed, outcome.elsewhere) == (6, 3, 0)
    bad = [r for r in records.values() if r.status == "failed"]
    assert {r.experiment.method for r in bad} == {"anp"}
    assert bad[0].error == "WorkerDied: the worker ended with exit code -9"
    assert crew.closed
    assert sorted(watch.begins) == sorted(watch.ends)


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sweep(batches(EXPERIMENTS[:4]), store, Fake(dies="anp"), watch=Watch())
    crew = Fake()
    todo = missing(batches(EXPERIMENTS), store.records())
    sweep(todo, store, crew, watch=Watch())
    assert sorted(crew.ran) == sorted(e.key for e in EXPERIMENTS[4:])


def test_failed_ones_are_run_again_only_if_asked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sweep(batches(EXPERIMENTS), store, Fake(dies="anp"), watch=Watch())
    assert missing(batches(EXPERIMENTS), store.records()) == []
    again = missing(batches(EXPERIMENTS), store.records(), retry=True)
    assert {b.experiments[0].method for b in again} == {"anp"}
    crew = Fake()
    sweep(again, store, crew, watch=Watch(), retry=True)
    assert len(crew.ran) == 3
    assert {r.status for r in store.records().values()} == {"done"}


def test_a_changed_spec_is_another_experiment(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sweep(batches(EXPERIMENTS), store, Fake(), watch=Watch())
    changed = [replace(e, images=100) for e in EXPERIMENTS]
    assert len(missing(batches(changed), store.records())) == 9


def test_a_record_of_other_defaults_is_not_reused(tmp_path: Path) -> None:
    store, made = Store(tmp_path), {"settings": settings_digest(EXPERIMENTS[0])}
    sweep(batches(EXPERIMENTS), store, Fake(), watch=Watch())
    first = store.records()[EXPERIMENTS[0].key]
    store.add([replace(first, made=made)])
    assert missing(batches(EXPERIMENTS), store.records()) == []
    store.add([replace(first, made={"settings": "of another version"})])
    assert first.key not in store.records()
    (again,) = missing(batches(EXPERIMENTS), store.records())
    assert again.experiments == (EXPERIMENTS[0],)


def test_a_record_of_a_model_made_by_other_defaults_is_not_reused(tmp_path: Path) -> None:
    trained = replace(EXPERIMENTS[0], model=replace(MODEL, source=None))
    store = Store(tmp_path)
    for digest, current in ((model_digest(trained.model), True), ("of another version", False)):
        made = {"model": digest}
        store.add([Record(key=trained.key, experiment=trained, status="done", made=made)])
        assert (trained.key in store.records()) is current
    assert model_digest(MODEL) is None  # its weights are in its spec


def test_two_sweeps_share_a_store(tmp_path: Path) -> None:
    crews = [Fake(seconds=0.02), Fake(seconds=0.02)]
    jobs = [
        threading.Thread(
            target=sweep,
            args=(batches(EXPERIMENTS), Store(tmp_path), crew),
            kwargs={"watch": Watch()},
        )
        for crew in crews
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    ran = [key for crew in crews for key in crew.ran]
    assert sorted(ran) == sorted(e.key for e in EXPERIMENTS)  # each once, by one of them
    assert len(Store(tmp_path).lines.read_text().splitlines()) == 9


def test_a_sweep_does_not_wait_for_what_another_one_does_not_run(tmp_path: Path) -> None:
    """Runs that begin alike may be of two sweeps at once."""
    store = Store(tmp_path)
    (whole,) = batches(SHARING)
    with store.claim(SHARING[0].key):  # by the other one
        outcome = sweep([whole], store, Fake(), watch=Watch())
    assert (outcome.done, outcome.elsewhere) == (2, 1)
    assert set(store.records()) == {e.key for e in SHARING[1:]}


def test_an_interrupt_leaves_no_record_of_what_ran(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def run(self, slot: int, batch: Batch) -> list[Record]:
            if batch.experiments[0].draw == 1:
                raise KeyboardInterrupt
            return super().run(slot, batch)

    store, crew = Store(tmp_path), Interrupted(slots=1)
    with pytest.raises(KeyboardInterrupt):
        sweep(batches(EXPERIMENTS), store, crew, watch=Watch())
    assert crew.closed
    assert {r.experiment.draw for r in store.records().values()} == {0}


AUTO = Experiment(model=MODEL, method="auto")
SHARING = [replace(AUTO, settings=s) for s in ({}, {"distilling.depth": 0.5}, {"rates": [0.1]})]
"""Three runs on one scan."""


@pytest.mark.parametrize(("keeps", "calls"), [(True, 3), (False, 1)])
def test_runs_that_share_a_beginning_are_recorded_one_by_one(
    tmp_path: Path, keeps: bool, calls: int
) -> None:
    """By workers that keep the beginning; others get the batch at once."""
    crew, watch = Fake(keeps=keeps), Watch()
    outcome = sweep(batches(SHARING), Store(tmp_path), crew, watch=watch)
    assert crew.calls == calls
    assert (outcome.done, outcome.failed) == (3, 0)
    assert len(watch.begins) == len(watch.ends) == 1
    assert set(Store(tmp_path).records()) == {e.key for e in SHARING}


@pytest.mark.parametrize(("call", "failed"), [(0, 3), (1, 1)])
def test_a_death_costs_one_run_but_in_the_first_one_all(
    tmp_path: Path, call: int, failed: int
) -> None:
    """The first run makes what the others begin with."""

    class Dying(Fake):
        def run(self, slot: int, batch: Batch) -> list[Record]:
            if self.calls == call:
                self.calls += 1
                raise WorkerDied("out of memory")
            return super().run(slot, batch)

    outcome = sweep(batches(SHARING), Store(tmp_path), Dying(), watch=Watch())
    assert (outcome.done, outcome.failed) == (3 - failed, failed)
    assert len(Store(tmp_path).records()) == 3


def test_an_interrupt_keeps_the_runs_of_a_batch_that_had_ended(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def run(self, slot: int, batch: Batch) -> list[Record]:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().run(slot, batch)

    with pytest.raises(KeyboardInterrupt):
        sweep(batches(SHARING), Store(tmp_path), Interrupted(slots=1), watch=Watch())
    assert len(Store(tmp_path).records()) == 2


def test_no_worker_waits_for_a_model_that_another_one_makes(tmp_path: Path) -> None:
    made = [replace(MODEL, source=None, seed=seed) for seed in range(2)]
    experiments = [Experiment(model=m, method=f"m{i}") for m in made for i in range(3)]
    crew = Fake(seconds=0.02)
    started: list[str] = []
    lock = threading.Lock()

    class Spy(Watch):
        def begun(self, batch: Batch) -> None:
            with lock:
                started.append(batch.model)

    sweep(batches(experiments), Store(tmp_path), crew, watch=Spy())
    assert set(started[:2]) == {m.key for m in made}


def test_batches_share_runs_and_begin_with_the_first_draws() -> None:
    rnp = Experiment(model=MODEL, method="rnp")
    oracle = replace(rnp, selection="oracle")
    later = replace(rnp, draw=1)
    found = batches([later, rnp, oracle, rnp])
    assert [b.experiments for b in found] == [(rnp, oracle), (later,)]


def test_runs_that_begin_alike_are_one_batch() -> None:
    auto = Experiment(model=MODEL, method="auto")
    deep = replace(auto, settings={"distilling.depth": 1.0, "rates": [0.1]})
    few = replace(auto, settings={"search.lessons": 1})
    brief = replace(auto, settings={"scan.exposures": 1})
    found = batches([auto, brief, deep, few, replace(deep, draw=1)])
    assert [b.experiments for b in found] == [(auto, deep, few), (brief,), (replace(deep, draw=1),)]
    assert len({batch.key for batch in found}) == 3
    known = {auto.key: Record(key=auto.key, experiment=auto, status="done", seconds=10.0)}
    assert estimate(found[:1], known) == (30.0, 0)
    former, low = replace(auto, method="auto:late"), replace(auto, method="auto:low")
    assert [b.experiments for b in batches([auto, former, low])] == [(auto, former), (low,)]
    wrong = [replace(auto, settings={"distilling.depth": said}) for said in ("deep", "deeper")]
    assert len(batches(wrong)) == 2  # each fails for itself
    tuned = [replace(auto, method="ft", settings={"rates": [k]}) for k in (1, 2)]
    assert len(batches(tuned)) == 2  # no other method has a beginning to share


def test_shards_are_a_partition_that_does_not_depend_on_the_rest() -> None:
    todo = batches(EXPERIMENTS)
    parts = [shard(todo, f"{i}/3") for i in range(3)]
    assert sorted(b.key for part in parts for b in part) == sorted(b.key for b in todo)
    assert shard(todo[:4], "1/3") == [b for b in parts[1] if b in todo[:4]]
    for text in ("3/3", "1", "a/b", "1/0", "-1/3"):
        with pytest.raises(ConfigurationError, match="a shard is i/n"):
            shard(todo, text)


def test_time_is_estimated_from_like_runs() -> None:
    def ran(spec: Experiment, seconds: float) -> tuple[str, Record]:
        record = Record(key=spec.key, experiment=spec, status="done", seconds=seconds)
        return spec.key, record

    wide = replace(EXPERIMENTS[0], model=replace(MODEL, width=64))
    known = dict([ran(EXPERIMENTS[0], 10.0), ran(EXPERIMENTS[3], 30.0), ran(wide, 500.0)])
    same = [replace(EXPERIMENTS[0], draw=7), replace(EXPERIMENTS[1], draw=7)]
    assert estimate(batches(same), known) == (20.0, 1)
    other = [replace(EXPERIMENTS[0], model=replace(MODEL, arch="vgg16"))]
    assert estimate(batches(other), known) == (30.0, 0)
    assert estimate([], known) == (0.0, 0)


def test_one_worker_a_device() -> None:
    assert devices("cpu", None) == ("cpu",)
    assert devices("cpu", 3) == ("cpu", "cpu", "cpu")


def _shipped(models: Path, spec: ModelSpec, method: str, draws: int) -> list[Experiment]:
    return [
        Experiment(model=spec, method=method, draw=d, seed=d, images=60, test_images=50)
        for d in range(draws)
    ]


def test_a_killed_worker_leaves_a_failed_record_and_the_next_one_works(
    tmp_path: Path, models: Path, shipped: ModelSpec
) -> None:
    killed: list[int] = []

    class Killer(Watch):
        def begun(self, batch: Batch) -> None:
            super().begun(batch)
            if batch.experiments[0].draw == 1 and not killed:
                killed.append(_children()[-1])
                os.kill(killed[0], signal.SIGKILL)  # before or while the task runs

    store = Store(tmp_path)
    crew = LocalWorkers(Place(store=tmp_path, models=(models,), threads=1), ("cpu",))
    todo = batches(_shipped(models, shipped, "clp", 3))
    outcome = sweep(todo, store, crew, watch=Killer())
    found = {r.experiment.draw: r for r in store.records().values()}
    assert killed
    assert (outcome.done, outcome.failed) == (2, 1)
    assert [found[d].status for d in range(3)] == ["done", "failed", "done"]
    assert "WorkerDied" in found[1].error


def _children() -> list[int]:
    """Worker processes of this one, in the order of their start."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                line = (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == os.getpid() and "spawn_main" in line:
                found.append(int(entry.name))
    return sorted(found)


SCRIPT = """
import sys
from pathlib import Path
from reprune.benchmark.local import LocalWorkers
from reprune.benchmark.sweep import Place

if __name__ == "__main__":
    crew = LocalWorkers(Place(store=Path(sys.argv[1])), ("cpu",))
    task = crew._pools[0].schedule(print, args=("started",))
    task.result()
    import os, multiprocessing
    print([child.pid for child in multiprocessing.active_children()][0], flush=True)
    os.kill(os.getpid(), 9)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    worker = int(done.stdout.split()[-1])
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the worker lived on")


def test_a_pool_that_leaves_its_task_pending_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen after a termination signal: the task of a stopped pool neither ended nor failed."""
    crew = LocalWorkers(Place(store=tmp_path), ("cpu",))
    monkeypatch.setattr(crew._pools[0], "schedule", lambda *_, **__: Future())
    ending = threading.Timer(0.1, crew.close)
    ending.start()
    with pytest.raises(Stopped):
        crew.run(0, batches(EXPERIMENTS)[0])
    ending.join()
