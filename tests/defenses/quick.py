"""Every method with settings that take a second on the toy model, for the contract suite."""

from __future__ import annotations

from dataclasses import replace

from reprune.defense import Defense
from reprune.defenses.clp import CLP
from reprune.defenses.coalition import Sampling
from reprune.defenses.shapley import ShapleyPruning
from reprune.detection import Inversion
from reprune.rnp import RNP, FineTuning, Recovering, Unlearning


def quick(defense: RNP, **changes: object) -> RNP:
    """The same behaviour with a few epochs of small batches; unlearning runs them all."""
    if defense.unlearning is not None:
        defense = replace(
            defense,
            unlearning=replace(defense.unlearning, epochs=3, batch_size=16, stop_accuracy=-1.0),
        )
    if defense.recovering is not None:
        recovering = replace(defense.recovering, epochs=2, batch_size=16)
        defense = replace(defense, recovering=recovering)
    return replace(defense, padding=1, **changes)


LEVELS = ("neuron", "filter")
INVERSION = Inversion(steps=20, images=16)
SAMPLING = Sampling(evaluations=30, per_order=10)
QUICK: dict[str, Defense] = {
    "default": quick(RNP()),
    "fine-tuning": quick(RNP(), finetuning=FineTuning(epochs=1, batch_size=16)),
    "without unlearning": quick(RNP(unlearning=None)),
    "without recovering": quick(RNP(recovering=None, score="changed")),
    **{
        f"{preset} {unlearn}-{recover}": quick(getattr(RNP, preset)(unlearn, recover))
        for preset in ("paper", "released")
        for unlearn in LEVELS
        for recover in LEVELS
    },
    "shapley": ShapleyPruning(inversion=INVERSION, sampling=SAMPLING, images=16),
    "shapley paper": replace(
        ShapleyPruning.paper(), inversion=INVERSION, sampling=SAMPLING, images=16
    ),
    "shapley without a trigger": ShapleyPruning(
        inversion=replace(INVERSION, flip=2.0), sampling=SAMPLING, images=16
    ),
    "clp": CLP(u=0.5),
    "clp paper": replace(CLP.paper(), u=1.0),
}
"""One entry a variant; the contract runs each."""

WILD: dict[str, Defense] = {
    "unlearning": quick(RNP(unlearning=Unlearning(lr=1e30, retries=0))),
    "recovering": quick(RNP(unlearning=None, recovering=Recovering(level="neuron", lr=1e30))),
}
"""Settings that diverge in the first epoch."""
