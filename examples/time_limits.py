"""What the default does within a time limit.

    python examples/time_limits.py --data DIR --models PLACE ... [--limits 120 190]
        [--output docs/results/time-limits.jsonl]

`--data` holds `cifar10/`, `gtsrb/` and `tiny_imagenet_20/`, each with its two parts; which of them
a model is of, its name says. A limit is in training epochs on the defence images (forward, backward
and step on 500 of them), timed before each run, so that what it leaves depends little on the
machine; a run without one takes some 310 on ten classes, or half of that. One draw, in float32, on
one thread. Models with a record of a limit are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from auto_once import compared, keep, purified
from results_page import records
from told import Told

from reprune.benchmark.epoch import training_epoch
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses import Auto

TIMED = 5


def epoch_seconds(model: Classifier, clean: ImageSet) -> float:
    """What a training epoch takes, the median of a few."""
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        training_epoch(model, clean)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def study(place: str, data: Path, limit: float) -> dict[str, object]:
    """The record of a model and a limit."""
    told = Told.of(place, data)
    unit = epoch_seconds(told.model, told.clean)
    limited = replace(Auto(), time_limit=limit * unit)
    result, said = purified(told.model, told.clean, auto=limited)
    return {
        "epoch seconds": round(unit, 3),
        **said,
        "repaired": result.trace.repaired,
        **compared(told.model, result.model, told.test, told.known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--limits", nargs="+", type=float, default=[120.0, 190.0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/time-limits.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {(record["model"], record["limit"]) for record in records(args.output)}
    for place, limit in product(args.models, args.limits):
        name = Path(place).name
        if (name, limit) not in done:
            record = study(place, args.data, limit)
            keep({"model": name, "limit": limit, **record}, args.output)


if __name__ == "__main__":
    main()
