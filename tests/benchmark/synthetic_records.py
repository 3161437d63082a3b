"""Synthetic records of everything that a benchmark can hold: methods, attacks, draws, failures."""

from __future__ import annotations

import random
from typing import Any

from reprune.benchmark.record import Record
from reprune.benchmark.spec import Experiment, ModelSpec, Selection

HOSTILE = 'said </script><b>bold</b> <!-- <script> & "quotes" 猫'
"""A note that ends a script element where it is not escaped."""

ATTACKS = ("clean", "badnets", "blend", "wanet", "sig")
METHODS = {"clp": 35.0, "ft": 30.0, "fp": 45.0, "ft-sam": 12.0, "rnp": 6.0, "nc+abl": 3.0}
"""Repairs, with the ASR that each leaves on average, in percent."""

DETECTORS = {"nc": 0.9, "unlearned-label": 0.6}
"""Detectors, with the share of backdoors that each finds."""


def model_spec(
    attack: str = "badnets", arch: str = "resnet18", width: int | None = 16
) -> ModelSpec:
    """A model trained on CIFAR-10."""
    return ModelSpec(attack=attack, arch=arch, width=width)


def made(hardware: str = "a processor, 2 threads") -> dict[str, Any]:
    """Circumstances as a run writes them."""
    return {
        "version": "0.1.0",
        "torch": "2.15.0",
        "hardware": hardware,
        "threads": 2,
        "at": "2026-10-01T12:00:00+00:00",
    }


def removal(
    model: ModelSpec,
    method: str,
    *,
    drop: float = 1.0,
    asr: float = 5.0,
    selection: Selection = "defender",
    draw: int = 0,
    settings: dict[str, Any] | None = None,
    images: int = 500,
    figures: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    seconds: float | None = 10.0,
) -> Record:
    """A finished repair that cost `drop` points and left the ASR, in percent, at `asr`."""
    experiment = Experiment(
        model=model,
        method=method,
        selection=selection,
        draw=draw,
        settings=settings or {},
        images=images,
    )
    before, after = {"ca": 88.0}, {"ca": round(88.0 - drop, 2)}
    if model.attack != "clean":
        before |= {"asr": 99.0, "ra": 1.0}
        after |= {"asr": round(asr, 2), "ra": round(0.85 * (100 - asr), 2)}
    return Record(
        key=experiment.key,
        experiment=experiment,
        status="done",
        before=before,
        after=after,
        figures=figures or {},
        notes=notes,
        seconds=seconds,
        made=made(),
    )


def failure(model: ModelSpec, method: str, error: str, **spec: Any) -> Record:
    """A run that ended with an error."""
    experiment = Experiment(model=model, method=method, **spec)
    return Record(
        key=experiment.key, experiment=experiment, status="failed", error=error, made=made()
    )


def detection(
    model: ModelSpec,
    method: str,
    verdict: str,
    *,
    found: int | None = None,
    top: int | None = None,
    draw: int = 0,
) -> Record:
    """A finished examination; backdoors lead to class 0."""
    experiment = Experiment(model=model, task="detection", method=method, draw=draw)
    target = None if model.attack == "clean" else 0
    return Record(
        key=experiment.key,
        experiment=experiment,
        status="done",
        figures={"verdict": verdict, "found": found, "top": top, "target": target},
        seconds=20.0,
        made=made(),
    )


def benchmark(seed: int = 0, draws: int = 3) -> list[Record]:
    """A whole benchmark: 2 architectures, 5 attacks, 6 methods, an oracle, failures, detectors."""
    dice = random.Random(seed)
    records = []
    for arch, width in (("resnet18", 16), ("vgg16", None)):
        for attack in ATTACKS:
            model = model_spec(attack, arch, width)
            poisoned = {"floor": round(dice.uniform(0.3, 3), 2)} if attack != "clean" else {}
            records.append(
                removal(model, "none", drop=0.0, asr=99.0, figures=poisoned, seconds=None)
            )
            for method, level in METHODS.items():
                records += _repairs(model, method, level, draws, dice)
            records += _detections(model, draws, dice)
    records[1] = failure(
        records[1].experiment.model,
        records[1].experiment.method,
        "DivergenceError: the loss became NaN in epoch 3; lower the learning rate",
    )
    return records


def _repairs(
    model: ModelSpec, method: str, level: float, draws: int, dice: random.Random
) -> list[Record]:
    hard = dice.uniform(0.2, 1.8)
    records = []
    for draw in range(draws):
        asr = min(100.0, level * hard * dice.uniform(0.7, 1.3))
        figures: dict[str, Any] = {"pruned": dice.randrange(4, 120), "channels": 1200}
        if method in ("rnp", "nc+abl") and model.attack != "clean":
            figures |= {"reactivated": min(100.0, 3 * asr), "queried": min(100.0, 2 * asr)}
        seconds = dice.uniform(2, 60)
        drop = dice.uniform(-0.4, 60 / (level + 10))
        notes = (HOSTILE,) if draw else ()
        common: dict[str, Any] = {"draw": draw, "figures": figures, "seconds": seconds}
        if method == "ft" and draw == 2:
            error = f"ConvergenceError: {HOSTILE}"
            records.append(failure(model, method, error, draw=draw))
            continue
        records.append(removal(model, method, drop=drop, asr=asr, notes=notes, **common))
        if method in ("clp", "rnp"):
            best: dict[str, Any] = {"drop": 0.7 * drop, "asr": 0.3 * asr}
            records.append(removal(model, method, selection="oracle", **best, **common))
            given = {"pruning.by": "fraction", "pruning.amount": 0.05}
            more: dict[str, Any] = {"drop": 2 * drop, "asr": 0.8 * asr, "settings": given}
            records.append(removal(model, method, selection="fixed", **more, **common))
    return records


def _detections(model: ModelSpec, draws: int, dice: random.Random) -> list[Record]:
    records = []
    for method, power in DETECTORS.items():
        for draw in range(draws):
            hit = dice.random() < (power if model.attack != "clean" else 0.2)
            verdict = "backdoored" if hit else dice.choice(["clean", "undecided"])
            top = 0 if dice.random() < power else 7
            found = top if hit else None
            records.append(detection(model, method, verdict, found=found, top=top, draw=draw))
    return records
