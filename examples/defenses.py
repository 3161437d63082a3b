"""Repair real backdoored models and a clean one with every method: the records of docs/defenses.md.

    python examples/defenses.py --data DIR [--models DIR] [--shard 0/2]

`--data` holds `cifar10/`, `cifar10_lossless/` and `gtsrb/` with `train.parquet` and `test.parquet`;
the zoo comes with the repository, `--models` holds published ones as for `published_models.py`.
Every method gets the same 500 images of the training rows; how much to prune is the defender's
choice. The trigger is used for the figures only. Seconds are of
the processor. One JSON line a run; finished runs are kept.
"""

from __future__ import annotations

import torch
from real_models import Store, Subject, Subjects, arguments, repair

from reprune.defenses import DEFENSES, make_defense
from reprune.training import autocast


def run(subject: Subject, method: str, draw: int) -> dict[str, object]:
    figures, result = repair(subject, make_defense(method), draw)  # type: ignore[arg-type]
    record = {
        "model": subject.name,
        "method": method,
        "draw": draw,
        "selection": "defender",
        "test_images": len(subject.test),
        **figures,
    }
    if result is None:
        return record
    return record | {
        "channels": sum(len(mask.values) for mask in result.trace.masks),
        "recovered": sorted(result.triggers),
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
