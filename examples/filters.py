"""Look for triggered images with every filter: the records of docs/comparison.md.

    python examples/filters.py --data DIR [--models DIR] [--clean DIR] [--shard 0/2]

Options as for `defenses.py`. STRIP gets test images of which half carry the trigger; methods for
training sets get training images of which a tenth carries it under the attacker's label. Seconds
are of the processor. One JSON line a run; finished runs are kept.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from real_models import Store, Subject, Subjects, arguments
from sklearn.metrics import roc_auc_score
from torch import Tensor

from reprune.attacks.goal import stamped
from reprune.data import ImageSet, draw
from reprune.detection.filters import FILTERS, make_filter
from reprune.errors import RepruneError
from reprune.training import autocast

MIXED, TRAINING, PERCENT, BINS = 400, 5000, 10, 24


def suspects(subject: Subject, training: bool, seed: int) -> tuple[ImageSet, Tensor]:
    """Images of which some carry the trigger, and which."""
    generator = torch.Generator().manual_seed(100 + seed)
    data = draw(*(subject.train, TRAINING) if training else (subject.test, MIXED), generator)
    marked = torch.zeros(len(data), dtype=torch.bool)
    if subject.known is None:
        return data, marked
    goal = subject.known.goal
    victims = goal.victims(data.labels).nonzero().flatten()
    count = len(data) * PERCENT // 100 if training else len(data) // 2
    rows = victims[torch.randperm(len(victims), generator=generator)[:count]]
    marked[rows] = True
    images, labels = data.images.clone(), data.labels.clone()
    images[rows] = stamped(data, rows, subject.known.trigger)
    if training:
        labels[rows] = goal.wanted(labels[rows], subject.loaded.classifier.num_classes)
    return ImageSet(images, labels, data.class_names), marked


def run(subject: Subject, method: str, seed: int) -> dict[str, Any]:
    chosen = make_filter(method)
    training = "training data" in chosen.needs
    images, marked = suspects(subject, training, seed)
    record: dict[str, Any] = {
        "model": subject.name,
        "method": method,
        "draw": seed,
        "sizes": {"mixed": MIXED, "training": TRAINING, "percent": PERCENT},
    }
    start = time.process_time()
    try:
        found = chosen(
            subject.loaded.classifier,
            images,
            None if training else subject.clean(seed),
            generator=torch.Generator().manual_seed(seed),
        )
    except RepruneError as error:
        return record | {"error": f"{type(error).__name__}: {error}"}
    seconds = time.process_time() - start
    scores, flagged = found.scores.cpu(), found.flagged.cpu()
    attacked = bool(marked.any())
    record |= {
        "found": round(100 * float(flagged[marked].float().mean()), 1) if attacked else None,
        "false": round(100 * float(flagged[~marked].float().mean()), 1),
        "auroc": round(float(roc_auc_score(marked, scores.nan_to_num(1e9))), 3)
        if attacked
        else None,
        "seconds": round(seconds, 1),
    }
    if not training:  # entropy histograms (RNP, Figure 8)
        low, high = float(scores.min()), float(scores.max())
        record["range"] = [round(low, 3), round(high, 3)]
        for name, part in (("clean", scores[~marked]), ("triggered", scores[marked])):
            record[f"{name} histogram"] = torch.histc(part, BINS, low, high).long().tolist()
            record[f"{name} mean"] = round(float(part.mean()), 3) if len(part) else None
    return record


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(methods=[name for name in FILTERS if ":" not in name and name != "abl"])
    args = parser.parse_args()
    subjects = Subjects(args)
    store = Store(
        args.output / "filters.jsonl", "model", "method", "draw", precision=args.precision
    )
    jobs = [
        {"model": model, "method": method, "draw": seed}
        for seed in range(args.draws)
        for model in args.only or subjects.folders
        for method in args.methods
    ]
    with autocast(torch.device("cpu"), args.precision):
        for job in store.missing(jobs, args.shard):
            store.add(run(subjects[job["model"]], job["method"], job["draw"]))


if __name__ == "__main__":
    main()
