"""Examine backdoored and clean models with every detector: the records of docs/comparison.md.

    python examples/detectors.py --data DIR [--models DIR] [--clean DIR] [--shard 0/2]
        [--triggers docs/results/triggers]

Options as for `defenses.py`; `--clean` holds models of `recipes/clean_models.py`. The recovered
trigger of a zoo model for the class with the highest index is kept in `--triggers`, for
`comparison_pictures.py`. Seconds are of
the processor. One JSON line a run; finished runs are kept.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from real_models import Store, Subject, Subjects, arguments

from reprune.attacks import write_trigger
from reprune.detection import DETECTORS, make_detector
from reprune.errors import RepruneError
from reprune.training import autocast


def run(subject: Subject, method: str, draw: int, triggers: Path) -> dict[str, object]:
    record: dict[str, object] = {
        "model": subject.name,
        "method": method,
        "draw": draw,
        "target": subject.known.goal.target if subject.known else None,
    }
    start = time.process_time()
    try:
        scanned = make_detector(method)(
            subject.loaded.classifier,
            subject.clean(draw),
            generator=torch.Generator().manual_seed(draw),
        )
    except RepruneError as error:
        seconds = round(time.process_time() - start, 1)
        return record | {"error": f"{type(error).__name__}: {error}", "seconds": seconds}
    seconds = time.process_time() - start
    finding, inverted = scanned.finding, scanned.inverted
    known = [score for score in finding.scores if math.isfinite(score.index)]
    top = max(known, key=lambda score: score.index).label if known else None
    pictured = draw == 0 and subject.name.startswith("zoo:")
    if pictured and inverted is not None and top in inverted.classes:
        triggers.mkdir(parents=True, exist_ok=True)
        name = f"{subject.name}-{method}-{draw}".replace(":", "-")
        write_trigger(inverted.trigger(inverted.classes.index(top)), triggers / f"{name}.npz")
    return record | {
        "verdict": finding.verdict,
        "found": finding.target,
        "top": top,
        "scores": [[s.label, s.size, round(s.index, 2), round(s.flip, 3)] for s in finding.scores],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--triggers", type=Path, default=Path("docs/results/triggers"))
    parser.set_defaults(methods=list(DETECTORS))
    args = parser.parse_args()
    subjects = Subjects(args)
    store = Store(
        args.output / "detectors.jsonl", "model", "method", "draw", precision=args.precision
    )
    jobs = [
        {"model": model, "method": method, "draw": draw}
        for draw in range(args.draws)
        for model in args.only or subjects.folders
        for method in args.methods
    ]
    with autocast(torch.device("cpu"), args.precision):
        for job in store.missing(jobs, args.shard):
            store.add(run(subjects[job["model"]], job["method"], job["draw"], args.triggers))


if __name__ == "__main__":
    main()
