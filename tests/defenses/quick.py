"""Every method with settings that take a second on the toy model, for the contract suite."""

from __future__ import annotations

from dataclasses import replace

from reprune.defense import Defense
from reprune.defenses.anp import ANP
from reprune.defenses.auto import Auto
from reprune.defenses.clp import CLP
from reprune.defenses.coalition import Sampling
from reprune.defenses.distilling import Distilling
from reprune.defenses.fine_pruning import FinePruning
from reprune.defenses.finetuning import FineTune, SharpnessAware
from reprune.defenses.ibau import IBAU
from reprune.defenses.nad import NAD, SteppedTuning
from reprune.defenses.onp import ONP, PPO
from reprune.defenses.shapley import ShapleyPruning
from reprune.defenses.trigger_bank import TriggerSearch
from reprune.defenses.trigger_repair import TriggerRepair
from reprune.detection import Inversion, Joint, NeuralCleanse, Scan
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


SEARCH = Inversion(steps=15, images=16, flip=0.6)
BRIEF = FineTuning(epochs=2, batch_size=16)
UNLEARN = Unlearning(epochs=3, batch_size=16, stop_accuracy=-1.0)
TUNING = FineTuning(epochs=2, batch_size=16)
STEPPED = SteppedTuning(epochs=2, batch_size=16, milestones=(1,))
LEVELS = ("neuron", "filter")
INVERSION = Inversion(steps=20, images=16)
PLAYING = PPO(episodes=4, batch_episodes=2, width=8, first_share=0.2)
GAME = {"steps": 3, "step_share": 0.2, "enough": 0.0}
JOINT = Joint(steps=6, images=8, flip=0.3)
LOOK = Scan(
    cleanse=NeuralCleanse(inversion=SEARCH, index=0.01, ratio=1.0, clear=1.0),
    unlearning=UNLEARN,
    exposures=2,
    joint=JOINT,
)
REPAIR = {
    "search": TriggerSearch(joint=JOINT, min_flip=0.0, lessons=1),
    "distilling": Distilling(steps=6, batch_size=16),
    "doubtful": Distilling(steps=6, batch_size=16, depth=1.0, mixed=3.0),
    "unsure": Distilling(steps=12, batch_size=16),
    "max_accuracy_drop": 1.0,
}
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
    "nc+ft": TriggerRepair(inversion=SEARCH, tuning=BRIEF),
    "nc+abl": TriggerRepair(by="unlearn", inversion=SEARCH, tuning=BRIEF),
    "nu+nc+abl": TriggerRepair(
        by="unlearn", inversion=SEARCH, tuning=BRIEF, unlearning=UNLEARN, min_flip=0.3
    ),
    "ft": FineTune(finetuning=TUNING),
    "ft-sam": FineTune(finetuning=TUNING, sam=SharpnessAware(rho=0.5)),
    "fp": FinePruning(finetuning=TUNING),
    "nu+fp": FinePruning(
        finetuning=None, unlearning=Unlearning(epochs=3, batch_size=16, stop_accuracy=-1.0)
    ),
    "nad": NAD(teaching=STEPPED, distilling=STEPPED),
    "nad by the norm": NAD(teaching=STEPPED, distilling=STEPPED, betas=(1.0,), squared=False),
    "ibau": IBAU(rounds=2, iterations=2, batch_size=32),
    "ibau paper": replace(IBAU.paper(), rounds=1, batch_size=32),
    "anp": ANP(steps=7, batch_size=16),
    "anp paper": replace(ANP.paper(), steps=5, batch_size=32, batch_norm="eval"),
    "shapley": ShapleyPruning(inversion=INVERSION, sampling=SAMPLING, images=16),
    "shapley paper": replace(
        ShapleyPruning.paper(), inversion=INVERSION, sampling=SAMPLING, images=16
    ),
    "shapley without a trigger": ShapleyPruning(
        inversion=replace(INVERSION, steps=1, flip=1.0), sampling=SAMPLING, images=16
    ),
    "onp": ONP(ppo=PLAYING, inversion=SEARCH, min_flip=0.3, candidates=None, **GAME),
    "onp, layers and candidates": ONP(
        ppo=PLAYING,
        inversion=SEARCH,
        unlearning=UNLEARN,
        min_flip=0.3,
        agents="layer",
        candidates="change",
        candidate_share=0.9,
        **GAME,
    ),
    "onp, masks and unlearned": ONP(
        ppo=PLAYING,
        inversion=SEARCH,
        unlearning=UNLEARN,
        recovering=Recovering(epochs=2, batch_size=16),
        synthesis=("nc", "nu+nc"),
        min_flip=0.3,
        candidates="mask",
        candidate_share=0.6,
        **GAME,
    ),
    "auto": Auto(scan=LOOK, **REPAIR),
    "auto without copies": Auto(scan=replace(LOOK, unlearning=None), **REPAIR),
    "clp": CLP(u=0.5),
    "clp paper": replace(CLP.paper(), u=1.0),
}
"""One entry a variant; the contract runs each."""

WILD: dict[str, Defense] = {
    "unlearning": quick(RNP(unlearning=Unlearning(lr=1e30, retries=0))),
    "ft": FineTune(finetuning=replace(TUNING, lr=1e30)),
    "ft-sam": FineTune(finetuning=replace(TUNING, lr=1e30), sam=SharpnessAware()),
    "fp": FinePruning(finetuning=replace(TUNING, lr=1e30)),
    "nad": NAD(teaching=replace(STEPPED, lr=1e30), distilling=STEPPED),
    "recovering": quick(RNP(unlearning=None, recovering=Recovering(level="neuron", lr=1e30))),
    "nc+ft": TriggerRepair(inversion=SEARCH, tuning=replace(BRIEF, lr=1e30), min_flip=0.2),
    "nu+nc+ft": TriggerRepair(inversion=SEARCH, unlearning=replace(UNLEARN, lr=1e30, retries=0)),
    "ibau": IBAU(rounds=1, batch_size=16, lr=1e30),
}
"""Settings that diverge in the first epoch."""
