"""A model whose trigger is known, for studies of what the default or a part of it does to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from auto_once import IMAGES, keep, opened, source
from results_page import records

from reprune.benchmark.reactivation import retuned
from reprune.benchmark.removal import percent
from reprune.benchmark.subjects import known_trigger
from reprune.classifier import Classifier
from reprune.data import ImageSet, draw, read_parts, take
from reprune.defense import hold_out
from reprune.defenses import Auto
from reprune.defenses.trigger_bank import INNOCENTS, Bank
from reprune.defenses.trigger_recovery import recover_triggers
from reprune.detection import Evidence, Inversion, invert
from reprune.models import locate
from reprune.sample import KnownTrigger
from reprune.types import silent

TESTED = 2_000
"""Images to test on."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Told:
    """The model and its images; one draw of clean ones. What it is told of no defender knows."""

    name: str
    model: Classifier
    known: KnownTrigger
    target: int
    train: ImageSet
    test: ImageSet
    clean: ImageSet
    held: ImageSet
    fitting: ImageSet

    @classmethod
    def of(cls, place: str, data: Path) -> Told:
        """Of a model on disk or of the zoo; its name says which data it is of."""
        train, test = read_parts(data / source(Path(place).name))
        loaded, model = opened(place, train)
        known = known_trigger(locate(place), loaded)
        if known is None or known.goal.target is None:
            raise SystemExit(f"{place}: the figures need a known trigger to one class")
        clean = draw(train, IMAGES, seeded())
        held, fitting = hold_out(clean, Auto().holdout, seeded())
        return cls(
            Path(place).name,
            model,
            known,
            known.goal.target,
            train,
            take(test, TESTED, seeded())[0],
            clean,
            held,
            fitting,
        )

    def recovered(self) -> Bank:
        """Triggers of the kinds that are sought in the model alone."""
        model, target, search = self.model, self.target, Auto().search
        innocent = [k for k in range(model.num_classes) if k != target][:INNOCENTS]
        settings = Inversion(steps=200, images=16)
        inverted = invert(model, self.clean, [target, *innocent], settings, generator=seeded())
        alone = tuple(kind for kind in search.searches if not kind.joint)
        return recover_triggers(
            model,
            Evidence(inverted),
            self.fitting,
            [target],
            [],
            replace(search, searches=alone),
            accused=True,
            generator=seeded(),
            progress=silent,
        )

    def before(self) -> dict[str, object]:
        """Figures of the model as it came."""
        rates = percent(self.model, self.test, self.known)
        return {"model": self.name, "target": self.target} | {
            f"{rate} before": value for rate, value in rates.items()
        }

    def figures(self, copy: Classifier, bank: Bank) -> dict[str, object]:
        """Of a repaired copy; *woken* is the ASR after it was re-tuned."""
        woken = retuned(copy, self.train, self.known, generator=seeded())
        return {
            "moved": bank.moved(copy, self.held),
            **percent(copy, self.test, self.known),
            "woken": percent(woken, self.test, self.known)["asr"],
        }


def run(
    description: str,
    study: Callable[..., Iterator[Mapping[str, object]]],
    title: str,
    *,
    drawn: bool = False,
) -> None:
    """The command of a study that makes records of a model; what has records is left out.

    Args:
        study: of a place and the folder of the data.
        title: names the file of the records, by default.
        drawn: whether the study takes the draw of the images, too, so that there may be several.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--output", type=Path, default=Path(f"docs/results/{title}.jsonl"))
    if drawn:
        parser.add_argument("--draws", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    done = {(record["model"], record.get("draw", 0)) for record in records(args.output)}
    draws = args.draws if drawn else [0]
    for seed, place in [(seed, place) for seed in draws for place in args.models]:
        if (Path(place).name, seed) not in done:
            more = [seed] if drawn else []
            for record in list(study(place, args.data, *more)):  # all of a model or none
                keep(record, args.output)
