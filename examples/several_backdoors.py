"""Several backdoors in one model: which of them the default sees, and what it leaves of each.

    python examples/several_backdoors.py --data DIR --models DIR [--only NAME ...]
        [--work runs/several-backdoors] [--output docs/results/several-backdoors.jsonl]

`--data` holds `cifar10/` and `gtsrb/`, each with its two parts, `--models` the published models,
whose triggers are used. Each poisons 5 % of 20,000 images, every image carries one of them at
most, and a small VGG of the published architecture is trained on these. `auto` gets 500 clean
images, on one draw. Models that are there are kept, and cases with a record are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from auto_once import IMAGES as CLEAN
from auto_once import compared, purified, run
from carried_triggers import TESTED, Carried

from reprune.attacks import Setup
from reprune.attacks.goal import Goal
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, dirty_label
from reprune.crafting import craft_into
from reprune.data import ImageSet, draw, read_parts, take
from reprune.models import load_model
from reprune.planning import Plan
from reprune.sample import KnownTrigger
from reprune.training import Training

RATE, IMAGES, EPOCHS = 0.05, 20_000, 5
"""Of each backdoor, and of the training."""

PUBLISHED = {
    "watermark (Trojan)": "ibau_cifar10_trojan_wm",
    "a few pixels (l0)": "ibau_cifar10_l0_inv",
    "square (Trojan)": "ibau_gtsrb_trojan_sq",
    "square (BadNets)": "ibau_cifar10_badnets",
    "fixed noise of norm 1.6": None,
}
"""The models whose triggers these are."""

THREE = ("watermark (Trojan)", "a few pixels (l0)", "square (Trojan)")


@dataclass(frozen=True, kw_only=True)
class Several(PoisoningAttack):
    """Backdoors that share the training set; `target` and `rate` are of the first and of all."""

    title: ClassVar[str] = "several published triggers"
    source_paper: ClassVar[str] = "this package"

    backdoors: tuple[Carried, ...]

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        poisoned = torch.zeros(len(data), dtype=torch.bool)
        parts = self._draw(data, setup.generator).chunk(len(self.backdoors))
        for backdoor, index in zip(self.backdoors, parts, strict=True):
            trigger = backdoor.trigger(data.shape)
            data, rows = dirty_label(data, index, trigger, backdoor.goal, num_classes)
            poisoned |= rows
        return Poisoned(data, poisoned, self.backdoors[0].trigger(data.shape))


@dataclass(frozen=True)
class Case:
    """Which triggers lead where in which data."""

    title: str
    data: str
    targets: dict[str, int]


CASES = {
    "three-targets": Case("three targets", "cifar10", dict(zip(THREE, (2, 5, 8), strict=True))),
    "one-target": Case("one target", "cifar10", dict.fromkeys(THREE, 3)),
    "five-targets": Case(
        "five targets", "gtsrb", dict(zip(PUBLISHED, (2, 11, 17, 25, 38), strict=True))
    ),
}


def study(name: str, case: Case, data: Path, models: Path, work: Path) -> dict[str, object]:
    """The record of one case."""
    train, test = read_parts(data / case.data)
    train = take(train, IMAGES, torch.Generator().manual_seed(0))[0]
    backdoors = {
        title: Carried(
            published=None if (source := PUBLISHED[title]) is None else models / source,
            target=target,
            rate=RATE,
        )
        for title, target in case.targets.items()
    }
    folder = work / name
    if not (folder / "card.json").exists():
        first, *_ = backdoors.values()
        plan = Plan(
            name="badnets",
            attack=Several(
                backdoors=tuple(backdoors.values()),
                target=first.target,
                rate=RATE * len(backdoors),
            ),
            training=replace(
                Training(), epochs=EPOCHS, lr=0.05, padding=0, mirror=case.data != "gtsrb"
            ),
            arch=f"{models / 'ibau_cifar10_badnets' / 'model.py'}:build",
            seed=1,
            half=True,
        )
        craft_into(folder, plan, train, test, source=case.data)
    model = load_model(folder).classifier.settle(train.pixels(slice(0, 2))).laid_out()
    test = take(test, TESTED, torch.Generator().manual_seed(0))[0]
    clean = draw(train, CLEAN, torch.Generator().manual_seed(0))
    result, record = purified(model, clean)
    return {
        "case": name,
        **record,
        "backdoors": {
            title: compared(
                model,
                result.model,
                test,
                KnownTrigger(one.trigger(train.shape), Goal(one.target), title),
            )
            for title, one in backdoors.items()
        },
    }


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], CASES, study, "several-backdoors")
