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

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from told import Told, run, seeded
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses import Auto, distilling
from reprune.evaluation import fitting_augmentation

DRAWN = 6
"""Mixtures of each clean image that are counted."""


RULES = ("as answered", "no likelier")


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


def as_answered(answers: Tensor, *_: object) -> Tensor:
    """The rule before: a mixture is taught as the model answers it."""
    return answers


def study(place: str, data: Path) -> Iterator[dict[str, object]]:
    """A record of each rule."""
    told, auto = Told.of(place, data), Auto()
    with told.model.evaluating():
        share = led(told.model, told.fitting, told.target)
        bank = told.recovered()
        lessons, settings = bank.taught(), replace(auto.distilling, lr=auto.rates[0])
        for rule, used in zip(RULES, (as_answered, distilling._no_likelier), strict=True):
            with patch.object(distilling, "_no_likelier", used):
                copy, _ = distilling.distil(
                    told.model, lessons, told.fitting, settings, generator=seeded()
                )
            yield {
                **told.before(),
                "led": round(share, 3),
                "rule": rule,
                **told.figures(copy, bank),
            }


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], study, "mixtures")
