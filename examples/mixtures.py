"""What mixtures of clean images teach a repair: as the model answers them, or as it does today.

    python examples/mixtures.py --data DIR --models PLACE ... [--output docs/results/mixtures.jsonl]

`--data` holds `cifar10/`, `gtsrb/` and `tiny_imagenet_20/`, each with its two parts; which of them
a model is of, its name says. A model may lead mixtures to the class of its backdoor, for they may
look triggered; so a lesson makes that class no likelier than either image does
(`reprune.defenses.distilling.distil`). Each model is repaired with that rule and without it, on the
same triggers of the kinds that are sought in the model alone. The repair is told the target class,
which no defender knows: what is compared is what mixtures teach. 500 images, one draw, in float32.
Models with records are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from auto_once import keep, source
from results_page import records
from torch import Tensor

from reprune.benchmark.reactivation import retuned
from reprune.benchmark.removal import percent
from reprune.benchmark.subjects import known_trigger
from reprune.classifier import Classifier
from reprune.data import ImageSet, draw, read_parts, take
from reprune.defense import hold_out
from reprune.defenses import Auto, distilling
from reprune.defenses.trigger_bank import INNOCENTS, Bank, recover_triggers
from reprune.detection import Evidence, Inversion, invert
from reprune.evaluation import fitting_augmentation, flip_rate
from reprune.models import load_model, locate
from reprune.types import silent

IMAGES, TESTED, DRAWN = 500, 2_000, 6
"""Clean images, those to test on, and mixtures of each clean one that are counted."""


RULES = ("as answered", "no likelier")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def led(model: Classifier, data: ImageSet, target: int) -> float:
    """The share of mixtures, none of whose images the model sees in `target`, that it does."""
    pixels, augment, generator = data.pixels(), fitting_augmentation(model, data), seeded()
    own, there, counted = model(pixels).argmax(1) == target, 0, 0
    for _ in range(DRAWN):
        pairs = torch.randperm(len(data), generator=generator)
        share = torch.rand(len(data), 1, 1, 1, generator=generator)
        images, others = augment(pixels, generator), ~(own | own[pairs])
        answers = model(images + share * (images[pairs] - images)).argmax(1)
        there += int(((answers == target) & others).sum())
        counted += int(others.sum())
    return there / max(1, counted)


def recovered(model: Classifier, clean: ImageSet, fitting: ImageSet, target: int) -> Bank:
    """Triggers for the target, and what innocent classes need."""
    innocent = [k for k in range(model.num_classes) if k != target][:INNOCENTS]
    settings = Inversion(steps=200, images=16)
    inverted = invert(model, clean, [target, *innocent], settings, generator=seeded())
    search = Auto().search
    alone = tuple(kind for kind in search.searches if not kind.joint)
    return recover_triggers(
        model,
        Evidence(inverted),
        fitting,
        [target],
        [],
        replace(search, searches=alone),
        accused=True,
        generator=seeded(),
        progress=silent,
    )


def as_answered(answers: Tensor, *_: object) -> Tensor:
    """The rule before: a mixture is taught as the model answers it."""
    return answers


def study(place: str, data: Path) -> Iterator[dict[str, object]]:
    """A record of each rule."""
    train, test = read_parts(data / source(Path(place).name))
    loaded = load_model(place)
    model = loaded.classifier.settle(train.pixels(slice(0, 2))).laid_out()
    known = known_trigger(locate(place), loaded)
    if known is None or known.goal.target is None:
        raise SystemExit(f"{place}: the figures need a known trigger to one class")
    test = take(test, TESTED, seeded())[0]
    auto, target = Auto(), known.goal.target
    clean = draw(train, IMAGES, seeded())
    held, fitting = hold_out(clean, auto.holdout, seeded())
    with model.evaluating():
        share = led(model, fitting, target)
        bank = recovered(model, clean, fitting, target)
        lessons, settings = bank.taught(), replace(auto.distilling, lr=auto.rates[0])
        for rule, used in zip(RULES, (as_answered, distilling._no_likelier), strict=True):
            with patch.object(distilling, "_no_likelier", used):
                copy, _ = distilling.distil(model, lessons, fitting, settings, generator=seeded())
            woken = retuned(copy, train, known, generator=seeded())
            moved = [flip_rate(copy, held, one.strongest, one.label) for one in bank.judges]
            yield {
                "model": Path(place).name,
                "target": target,
                "led": round(share, 3),
                "rule": rule,
                "moved": sum(moved) / len(moved),
                **{f"{rate} before": value for rate, value in percent(model, test, known).items()},
                **percent(copy, test, known),
                "woken": percent(woken, test, known)["asr"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--output", type=Path, default=Path("docs/results/mixtures.jsonl"))
    args = parser.parse_args()
    done = {record["model"] for record in records(args.output)}
    for place in [place for place in args.models if Path(place).name not in done]:
        for record in list(study(place, args.data)):  # both rules or none
            keep(record, args.output)


if __name__ == "__main__":
    main()
