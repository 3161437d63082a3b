"""Repair real backdoored models and a clean one with every method: the records of docs/defenses.md.

    python examples/defenses.py --data DIR [--models DIR] [--shard 0/2]

`--data` holds `cifar10/`, `cifar10_lossless/` and `gtsrb/` with `train.parquet` and `test.parquet`;
the zoo comes with the repository, `--models` holds published ones as for `published_models.py`.
Every method gets the same 500 images of the training rows; how much to prune is the defender's
choice. The trigger is used for the figures only. Seconds are of
the processor. One JSON line a run; finished runs are kept.
"""

from __future__ import annotations

import time

import torch
from real_models import Store, Subject, Subjects, arguments

from reprune.defenses import DEFENSES, make_defense
from reprune.errors import RepruneError
from reprune.training import autocast


def run(subject: Subject, method: str, draw: int) -> dict[str, object]:
    record: dict[str, object] = {
        "model": subject.name,
        "method": method,
        "draw": draw,
        "selection": "defender",
        "test_images": len(subject.test),
        "before": subject.figures(subject.loaded.classifier),
    }
    start = time.process_time()
    try:
        result = make_defense(method)(
            subject.loaded.classifier,
            subject.clean(draw),
            generator=torch.Generator().manual_seed(draw),
        )
    except RepruneError as error:
        return record | {"error": f"{type(error).__name__}: {error}"}
    seconds = time.process_time() - start
    trace = result.trace
    return record | {
        "after": subject.figures(result.model),
        "pruned": sum(len(mask.pruned) for mask in trace.masks),
        "channels": sum(len(mask.values) for mask in trace.masks),
        "recovered": sorted(result.triggers),
        "seconds": round(seconds, 1),
        "notes": list(trace.notes),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(methods=[name for name in DEFENSES if ":" not in name])
    args = parser.parse_args()
    subjects = Subjects(args)
    names = args.only or [n for n in subjects.folders if not n.startswith("clean:")]
    store = Store(
        args.output / "defenses.jsonl", "model", "method", "draw", precision=args.precision
    )
    jobs = [
        {"model": model, "method": method, "draw": draw}
        for draw in range(args.draws)
        for model in names
        for method in args.methods
    ]
    with autocast(torch.device("cpu"), args.precision):
        for job in store.missing(jobs, args.shard):
            store.add(run(subjects[job["model"]], job["method"], job["draw"]))


if __name__ == "__main__":
    main()
