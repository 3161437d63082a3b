"""What `auto` does to one model whose trigger is known: what the studies of it record."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
from results_page import records

from reprune.benchmark.removal import percent
from reprune.classifier import Classifier
from reprune.data import ImageSet, draw
from reprune.defense import Purified
from reprune.defenses import Auto
from reprune.defenses.trigger_bank import INNOCENTS
from reprune.detection import FamilyName, Joint, invert_jointly
from reprune.models import LoadedModel, load_model
from reprune.report import hardware
from reprune.sample import KnownTrigger

Case = TypeVar("Case")

IMAGES = 500

SOURCES = ("cifar10", "gtsrb", "tiny_imagenet_20")
"""Data sets, of which a model's name has one; without any it is of the first."""

STARTS = 4
"""Filters that are sought for the suspect."""


def source(name: str) -> str:
    """The data that a model of this name is of."""
    return next((data for data in SOURCES if data.partition("_")[0] in name), SOURCES[0])


def opened(place: str | Path, train: ImageSet) -> tuple[LoadedModel, Classifier]:
    """A model on disk or of the zoo, as it came and ready for the searches."""
    loaded = load_model(place)
    return loaded, loaded.classifier.settle(train.pixels(slice(0, 2))).laid_out()


def repaired(
    model: Classifier, train: ImageSet, test: ImageSet, known: KnownTrigger | None, seed: int = 0
) -> dict[str, object]:
    """The verdict on the model, and its figures before and after; on 500 images of draw `seed`.

    Of a repaired one also how large filters are that lead to the suspect, and to others.
    """
    clean = draw(train, IMAGES, torch.Generator().manual_seed(seed))
    result, record = purified(model, clean, seed)
    suspect = record["suspect"]
    return {
        **record,
        **compared(model, result.model, test, known),
        **(filters(result.model, clean, suspect) if isinstance(suspect, int) else {}),
    }


def purified(
    model: Classifier, clean: ImageSet, seed: int = 0, auto: Auto | None = None
) -> tuple[Purified, dict[str, object]]:
    """What `auto` makes of the model, and what it says of it."""
    began = time.perf_counter()
    result = (auto or Auto())(model, clean, generator=torch.Generator().manual_seed(seed))
    seconds = round(time.perf_counter() - began)
    assert result.scanned is not None
    finding = result.scanned.finding
    return result, {
        "verdict": finding.verdict,
        "strength": finding.strength,
        "suspect": finding.suspect,
        "signs": [[s.search, s.label, round(s.strength, 3)] for s in finding.signs],
        "notes": result.trace.notes,
        "seconds": seconds,
    }


def compared(
    before: Classifier, after: Classifier, test: ImageSet, known: KnownTrigger | None
) -> dict[str, object]:
    """Figures of a model and of what became of it, in percent."""
    return {
        f"{rate} {when}": share
        for when, model in (("before", before), ("after", after))
        for rate, share in percent(model, test, known).items()
    }


def filters(model: Classifier, clean: ImageSet, suspect: int) -> dict[str, object]:
    """Sizes of filters, in the model alone: several to the suspect, one to each of some others."""
    others = [k for k in range(model.num_classes) if k != suspect][:INNOCENTS]
    sizes = sought(model, clean, [suspect] * STARTS + others, "filter")
    return {"filters": sizes[:STARTS], "filters of others": sizes[STARTS:]}


def sought(
    model: Classifier, clean: ImageSet, classes: Sequence[int], family: FamilyName, seed: int = 0
) -> list[float | None]:
    """Sizes of the smallest triggers of a family that lead to these classes in the model alone."""
    with model.evaluating():
        found = invert_jointly(
            model,
            [model],
            clean,
            classes,
            family,
            Joint(weight=0.0),
            generator=torch.Generator().manual_seed(seed),
        )
    return [size if math.isfinite(size) else None for size in found.sizes]


def keep(record: Mapping[str, object], output: Path) -> None:
    """Add a record to a file, with the hardware and the day, and print it."""
    made = {"hardware": hardware(), "date": datetime.now(UTC).date().isoformat()}
    with output.open("a") as lines:
        lines.write(json.dumps({**record, **made}) + "\n")
    print(json.dumps({**record}), flush=True)


def run(
    description: str,
    cases: Mapping[str, Case],
    study: Callable[[str, Case, Path, Path, Path], Mapping[str, object]],
    title: str,
) -> None:
    """The command of a study of models that it trains; cases with a record are left out.

    Args:
        cases: by name.
        study: makes a record from a case, the data, the published models and `--work`.
        title: names the folder of the models and the file of the records, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--work", type=Path, default=Path("runs") / title)
    parser.add_argument("--output", type=Path, default=Path(f"docs/results/{title}.jsonl"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    done = {record["case"] for record in records(args.output)}
    for name in [name for name in args.only if name not in done]:
        keep(study(name, cases[name], args.data, args.models.resolve(), args.work), args.output)
