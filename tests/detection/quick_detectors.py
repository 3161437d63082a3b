"""Every detector with settings that take a moment on the toy model, for the contract suite."""

from __future__ import annotations

from dataclasses import replace

from reprune.detection import (
    Detector,
    Inversion,
    Joint,
    NeuralCleanse,
    Scan,
    UnlearnedLabel,
)
from reprune.rnp import Unlearning

UNLEARN = Unlearning(epochs=3, batch_size=16, stop_accuracy=-1.0, retries=0)
INVERT = Inversion(steps=6, images=8)
ROUNDS = replace(Inversion.paper(), steps=6, images=8, every=3)
CLEANSE = NeuralCleanse(inversion=INVERT)

QUICK: dict[str, Detector] = {
    "scan": Scan(cleanse=CLEANSE, unlearning=UNLEARN, joint=Joint(steps=6, images=8)),
    "scan without label": Scan(cleanse=CLEANSE, unlearning=None),
    "nc": CLEANSE,
    "nc:paper": replace(NeuralCleanse.paper(), inversion=ROUNDS),
    "nu+nc": replace(CLEANSE, unlearning=UNLEARN),
    "nu": UnlearnedLabel(unlearning=UNLEARN, runs=2),
    "nu:paper": replace(UnlearnedLabel.paper(), unlearning=UNLEARN),
}
"""One entry a variant; the contract runs each."""

BROKEN = replace(UNLEARN, lr=1e30)
WILD: dict[str, Detector] = {
    "nu+nc": replace(CLEANSE, unlearning=BROKEN),
    "nu": UnlearnedLabel(unlearning=BROKEN),
}
"""Settings under which unlearning diverges in the first epoch."""
