"""What the benchmark's runner adds to the experiments themselves.

    python benchmarks/bench.py [--repeats 3] [--output docs/results/bench-overhead.jsonl]

The same experiments on the model that ships with the package, called directly and through a sweep
with one worker, alternating in one run. Seconds are of the processor, children included, so that
other work on the machine does not count; starting the worker (importing torch, reading images) is
part of the sweep and told apart.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import finish

from reprune import demo
from reprune.benchmark.local import LocalWorkers
from reprune.benchmark.profiles import given_models
from reprune.benchmark.record import Record
from reprune.benchmark.run import run
from reprune.benchmark.spec import Experiment
from reprune.benchmark.store import Store
from reprune.benchmark.subjects import Subjects
from reprune.benchmark.sweep import Batch, Place, batches, sweep


class Quiet:
    """Tells nobody."""

    def begun(self, batch: Batch) -> None: ...

    def ended(self, batch: Batch, records: Sequence[Record]) -> None: ...


def processor(job: Callable[[], object]) -> float:
    """Seconds of this process and of children that ended meanwhile."""

    def now() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        used = [resource.getrusage(kind) for kind in kinds]
        return sum(one.ru_utime + one.ru_stime for one in used)

    start = now()
    job()
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append the result to this JSON lines file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models" / "shipped").mkdir(parents=True)
        for file in ("card.json", "model.safetensors", "trigger.npz"):
            shutil.copy(demo.folder() / file, folder / "models" / "shipped" / file)
        (spec,) = given_models([folder / "models"], {"cifar10": "demo"})
        experiments = [
            Experiment(model=spec, method=method, draw=draw, seed=draw, test_images=500)
            for draw in range(2)
            for method in ("ft", "fp", "rnp", "clp")
        ]
        todo = batches(experiments)
        place = Place(store=folder, models=(folder / "models",), threads=1)
        times: dict[str, list[float]] = {"direct": [], "sweep": [], "start": []}

        def directly(subjects: Subjects) -> None:
            for batch in todo:
                run(batch.experiments, subjects)

        def swept(some: list[Batch], number: str) -> None:
            crew = LocalWorkers(place, ("cpu",))
            sweep(some, Store(folder / number), crew, watch=Quiet())

        nothing = [Batch((Experiment(model=spec, test_images=1),))]
        for repeat in range(args.repeats):
            subjects = Subjects(None, folder / "cache", place.models)
            direct = processor(partial(directly, subjects))
            times["direct"].append(direct)
            times["sweep"].append(processor(partial(swept, todo, f"sweep{repeat}")))
            times["start"].append(processor(partial(swept, nothing, f"start{repeat}")))
    middle = {name: statistics.median(values) for name, values in times.items()}
    result: dict[str, Any] = {
        "experiments": len(experiments),
        "repeats": args.repeats,
        "sweep / direct": round(middle["sweep"] / middle["direct"], 3),
        "sweep without starting / direct": round(
            (middle["sweep"] - middle["start"]) / middle["direct"], 3
        ),
        "seconds, direct": round(middle["direct"], 1),
        "seconds, starting a worker": round(middle["start"], 1),
    }
    finish(result, torch.device("cpu"), args.output)


if __name__ == "__main__":
    main()
