"""`Auto` with settings that take seconds on the planted model, and what tests of it share."""

from __future__ import annotations

from dataclasses import replace

import torch

import planted
from reprune.attacks import Attack
from reprune.classifier import Classifier
from reprune.deadline import NO_END, Deadline
from reprune.defenses import Auto
from reprune.defenses.auto import LAST_HALF
from reprune.defenses.distilling import Distilling
from reprune.defenses.trigger_bank import Bank, Search, TriggerSearch
from reprune.defenses.trigger_recovery import recover_triggers
from reprune.detection import Evidence, FamilyName, Inversion, Joint, Scan
from reprune.evaluation import evaluate
from reprune.results import Sign
from reprune.rnp import Unlearning
from reprune.types import silent

CLEAN = planted.stripes(200, seed=3)
FEW = replace(LAST_HALF, steps=100, batch_size=32)
"""Lessons of few and small steps."""
AUTO = Auto(
    scan=Scan(
        cleanse=replace(Scan().cleanse, inversion=Inversion(steps=80, images=8)),
        unlearning=Unlearning(batch_size=32),
        joint=Joint(steps=60, images=8),
    ),
    search=TriggerSearch(joint=Joint(steps=50)),
    distilling=FEW,
    doubtful=Distilling(steps=100, batch_size=32),
    unsure=FEW,
    rates=(0.03, 0.1),
    max_accuracy_drop=0.1,
)
DULL = replace(
    AUTO.scan,
    cleanse=replace(AUTO.scan.cleanse, index=50.0),
    index=50.0,
    ratio=0.01,
    gap=50.0,
    bent=0.01,
    ahead=50.0,
    pull=50.0,
)
"""Accuses no model."""
QUICK = replace(AUTO, scan=replace(AUTO.scan, unlearning=None))
"""For what does not depend on unlearned copies."""
BRIEF = replace(
    QUICK,
    search=TriggerSearch(
        searches=(Search("patch"), Search("additive")), joint=Joint(steps=30), lessons=1
    ),
    distilling=replace(LAST_HALF, steps=40),
    unsure=replace(LAST_HALF, steps=40),
)
"""For what happens after the scan, whatever is recovered."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rates(model: Classifier, attack: Attack = planted.ATTACK) -> tuple[float, float]:
    test = planted.stripes(400, seed=9)
    measured = evaluate(model, test, trigger=attack.trigger(test.shape), target=attack.target)
    return measured.ca.share, measured.asr.share


def same(first: Classifier, second: Classifier) -> bool:
    weights = first.state_dict()
    return all(torch.equal(weights[k], v) for k, v in second.state_dict().items())


def bank(
    evidence: Evidence, *more: FamilyName, support: str = "", patience: Deadline = NO_END
) -> Bank:
    return recover_triggers(
        planted.model(True),
        evidence,
        CLEAN,
        [planted.TARGET],
        [],
        TriggerSearch(searches=tuple(map(Search, ("additive", *more))), lessons=1, min_flip=0.0),
        accused=False,
        support=[Sign(support, planted.TARGET, 0.5, "")] if support else [],
        generator=generator(),
        progress=silent,
        patience=patience,
    )
