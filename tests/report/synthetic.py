"""A synthetic report with everything in it, for the tests of this folder."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from reprune.metrics import wilson_interval
from reprune.report import (
    Budget,
    Comparison,
    DataInfo,
    Example,
    Method,
    ModelInfo,
    Report,
    Weights,
)
from reprune.results import (
    BackdoorLabel,
    Epoch,
    Evaluation,
    Finding,
    PruningPoint,
    Rate,
    Sign,
    SiteMask,
    Trace,
)

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def rate(hits: int, total: int) -> Rate:
    return Rate(hits, total, hits / total if total else 0.0, wilson_interval(hits, total))


def evaluation(shares: list[float], total: int, *, asr: float | None = None) -> Evaluation:
    per_class = tuple(rate(round(share * total), total) for share in shares)
    hits, count = sum(r.hits for r in per_class), total * len(shares)
    attacked = count - total
    return Evaluation(
        ca=rate(hits, count),
        per_class=per_class,
        predictions=tuple(total for _ in shares),
        target=None if asr is None else 0,
        asr=None if asr is None else rate(round(asr * attacked), attacked),
        ra=None if asr is None else rate(round((0.93 - 0.9 * asr) * attacked), attacked),
    )


def make_masks(generator: np.random.Generator) -> tuple[SiteMask, ...]:
    masks = []
    for stage in range(1, 5):
        for block in range(2):
            for conv in range(1, 3):
                channels = 64 * 2 ** (stage - 1)
                values = 1 - generator.beta(0.6, 6, channels) * 0.9
                if stage > 2:
                    hit = generator.choice(channels, 2 * stage, replace=False)
                    values[hit] = generator.uniform(0, 0.15, len(hit))
                masks.append(
                    SiteMask(
                        site=f"layer{stage}.{block}.bn{conv}",
                        layer=f"layer{stage}.{block}.conv{conv}",
                        values=tuple(values.tolist()),
                        scores=tuple(values.tolist()),
                        pruned=tuple(np.flatnonzero(values < 0.2).tolist()),
                    )
                )
    return tuple(masks)


def make_report(command: Literal["purify", "scan"] = "purify", classes: int = 10) -> Report:
    """A backdoored ResNet-18; `classes` other than ten has traffic-sign like class names."""
    generator = np.random.default_rng(7)
    purify = command == "purify"
    names = NAMES if classes == 10 else [f"Speed limit (type {k})" for k in range(classes)]
    histogram = [488, *generator.integers(0, 3, classes - 1).tolist()]
    total = sum(histogram)
    shares = generator.uniform(0.86, 0.98, classes).tolist()
    after = [share - generator.uniform(-0.01, 0.02) for share in shares]
    after[3] -= 0.12
    masks = make_masks(generator)
    curve = tuple(
        PruningPoint(
            threshold=0.05 * i,
            channels=round(4 * 1.472**i) - 4,
            accuracy=0.93 - 0.002 * math.expm1(0.42 * i),
            drop=0.002 * math.expm1(0.42 * i),
            disagreement=0.003 * math.expm1(0.38 * i),
        )
        for i in range(15)
    )
    return Report(
        command=command,
        created="2026-11-14T09:26:53Z",
        finding=Finding(
            "backdoored",
            (
                "The unlearned model sends nearly all clean images to one class.",
                "Its favourite class leads by far.",
            ),
            0,
            signs=(
                Sign("added pictures", 0, 1.375, "Class 0 needs the smallest picture."),
                Sign("all-to-all", None, 0.125, "No picture leads all images elsewhere."),
            ),
        ),
        method=Method(
            "RNP",
            {
                "unlearning.lr": 0.01,
                "unlearning.milestones": "10, 20",
                "unlearning.stop_accuracy": None,
                "recovering.lr": 0.2,
                "recovering.shift": False,
                "recovering.epochs": 20,
            },
        ),
        model=ModelInfo(
            architecture="resnet18",
            input_shape=(3, 32, 32),
            num_classes=classes,
            original=Weights("vendor-model.safetensors", "3f" * 32, 11_173_962),
            repaired=Weights("repaired.safetensors", "a9" * 32, 11_102_345) if purify else None,
            class_names=tuple(names),
        ),
        data=DataInfo("cifar10-clean.parquet", images=500, held_out=150, seed=7),
        trace=Trace(
            phases={
                "unlearn": tuple(
                    Epoch(i, -math.expm1(0.2 * i) - 0.1, 0.97 / (1 + math.exp(0.8 * (i - 8))))
                    for i in range(12)
                ),
                "recover": tuple(
                    Epoch(i, 2.1 * math.exp(-0.3 * i), 0.9 - 0.6 * math.exp(-0.35 * i))
                    for i in range(20)
                )
                if purify
                else (),
            },
            masks=masks if purify else (),
            curve=curve if purify else (),
            chosen=7 if purify else None,
            label=BackdoorLabel(
                label=0,
                histogram=tuple(histogram),
                share=488 / total,
                margin=(488 - max(histogram[1:])) / total,
                reason="one class takes nearly all predictions of the unlearned model",
            ),
            notes=("Batch-norm statistics moved in unlearning.",),
            seconds={"unlearn": 41.24, "recover": 63.08, "prune": 12.51}
            if purify
            else {"unlearn": 41.24},
        ),
        clean=Comparison(
            "clean test images",
            evaluation(shares, 100),
            evaluation(after, 100) if purify else None,
        ),
        attacked=Comparison(
            "9,000 test images",
            evaluation(shares, 900, asr=0.998),
            evaluation(after, 900, asr=0.012) if purify else None,
            trigger="white 3x3 square, bottom right",
        ),
        budget=Budget("drop", 0.05) if purify else None,
        examples=tuple(
            Example(
                label=k % 10,
                before=0 if k > 5 else k % 10,
                after=(k if k != 3 else 5) % 10 if purify else None,
                triggered=k > 5,
            )
            for k in range(12)
        ),
        versions={"reprune": "0.1.0", "python": "3.11.2", "torch": "2.15.0"},
        hardware="NVIDIA H200 (CUDA 13.2)",
        notes=("Only 500 defence images: intervals are wide.",),
    )
