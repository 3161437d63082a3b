"""How far the default carries: published triggers in models and data that others did not publish.

    python examples/carried_triggers.py --data DIR --models DIR [--only NAME ...]
        [--work runs/carried-triggers] [--output docs/results/carried-triggers.jsonl]

`--data` holds `cifar10/`, `gtsrb/` and `tiny_imagenet_20/`, each with its two parts, `--models` the
published models, whose triggers are carried to another data set, twice as large on images of
64 x 64: poisoned at a rate of 10 %, a network is trained anew, and `auto` gets 500 clean images, on
one draw. Models that are there are kept, a run that was killed goes on where it was, and cases with
a record are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from auto_once import repaired, run
from other_attacks import soft

from reprune.attacks import Stamp, read_trigger
from reprune.attacks.stamping import StampingAttack
from reprune.benchmark.subjects import known_trigger
from reprune.crafting import craft_into
from reprune.data import read_parts, take
from reprune.models import load_model
from reprune.planning import Plan
from reprune.training import Training

TESTED = 2_000

NOISE = 1.6
"""Norm of the fixed noise, a trigger that is in no published model here."""


@dataclass(frozen=True, kw_only=True)
class Carried(StampingAttack):
    """The trigger of a published model, or without one fixed noise, soft or of single pixels."""

    title: ClassVar[str] = "a published trigger"
    source_paper: ClassVar[str] = "this package"

    published: Path | None
    soft: bool = False
    seed: int = 1

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        if self.soft:
            return soft(shape)
        if self.published is None:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
            return Stamp(torch.ones(shape), noise / noise.norm() * NOISE)
        trigger = read_trigger(self.published / "trigger.npz")
        assert isinstance(trigger, Stamp)
        side = shape[1] // trigger.add.shape[1]
        grown = (
            part.repeat_interleave(side, 1).repeat_interleave(side, 2)
            for part in (trigger.keep, trigger.add)
        )
        return Stamp(*grown)


@dataclass(frozen=True)
class Network:
    """What is trained, and on how many images; without `arch` the published one, or on all."""

    arch: str | None = None
    width: float | None = None
    lr: float = 0.05
    padding: int = 4
    images: int | None = None


SMALL_VGG = Network(padding=0)
MOBILE = Network("mobilenetv2", width=0.5, images=20_000)
VGG16 = Network("vgg16", width=16, lr=0.1)


@dataclass(frozen=True)
class Case:
    """What is carried where."""

    title: str
    data: str
    published: str | None
    target: int
    epochs: int
    network: Network = SMALL_VGG
    soft: bool = False


CASES = {
    "gtsrb-trojan-wm": Case("watermark (Trojan)", "gtsrb", "ibau_cifar10_trojan_wm", 2, 4),
    "cifar10-trojan-sq": Case("square (Trojan)", "cifar10", "ibau_gtsrb_trojan_sq", 2, 5),
    "gtsrb-noise": Case("fixed noise of norm 1.6", "gtsrb", None, 3, 4),
    "gtsrb-l0": Case("a few pixels (l0)", "gtsrb", "ibau_cifar10_l0_inv", 0, 4),
    "cifar10-mobile-sq": Case(
        "square (Trojan), MobileNetV2", "cifar10", "ibau_gtsrb_trojan_sq", 5, 4, MOBILE
    ),
    "tiny-vgg16-trojan-wm": Case(
        "watermark (Trojan), VGG-16",
        "tiny_imagenet_20",
        "ibau_cifar10_trojan_wm",
        7,
        8,
        VGG16,
    ),
    "cifar10-soft": Case("soft noise of norm 2.5", "cifar10", None, 6, 5, soft=True),
    "gtsrb-soft": Case("soft noise of norm 2.5", "gtsrb", None, 6, 4, soft=True),
    "cifar10-noise": Case("fixed noise of norm 1.6", "cifar10", None, 1, 5),
}


def study(name: str, case: Case, data: Path, models: Path, work: Path) -> dict[str, object]:
    """The record of one case."""
    train, test = read_parts(data / case.data)
    network = case.network
    if network.images is not None:
        train = take(train, network.images, torch.Generator().manual_seed(0))[0]
    folder = work / name
    if not (folder / "card.json").exists():
        source = None if case.published is None else models / case.published
        training = replace(
            Training(),
            epochs=case.epochs,
            lr=network.lr,
            padding=network.padding,
            mirror=case.data != "gtsrb",
        )
        plan = Plan(
            name="badnets",
            attack=Carried(published=source, soft=case.soft, target=case.target, rate=0.1),
            training=training,
            arch=network.arch or f"{models / 'ibau_cifar10_badnets' / 'model.py'}:build",
            arch_args={} if network.width is None else {"width": network.width},
            seed=1,
            half=True,
        )
        craft_into(folder, plan, train, test, source=case.data)
    loaded = load_model(folder)
    classifier = loaded.classifier.settle(train.pixels(slice(0, 2))).laid_out()
    known = known_trigger(folder, loaded)
    test = take(test, TESTED, torch.Generator().manual_seed(0))[0]
    return {
        "case": name,
        "data": case.data,
        "target": case.target,
        **repaired(classifier, train, test, known),
    }


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], CASES, study, "carried-triggers")
