"""Which of the benchmark's records the page of the default method shows."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from reprune.benchmark.papers import FORMER
from reprune.benchmark.profiles import SMALL
from reprune.benchmark.record import Record

IMAGES = 500

NEAR = "auto, triggers 0.5"
"""What repaired the small models; within the error of `auto` in the table of settings."""

DEFAULTS: dict[str, dict[str, Any]] = {"auto": {}, FORMER: {}, NEAR: {"distilling.weight": 0.5}}
"""Settings of the default, of what it was, and of `NEAR`, by name; a method up to the comma."""

PRUNE = ("rnp", "clp", "anp", "shapley", "onp")
"""Methods that only prune."""

PUBLISHED = "models:ibau_"

LAST_DRAW = SMALL.draws - 1
"""Repairs of this draw were re-tuned."""

ORIGINS = ("zoo", "published", "small, in view", "small, set aside")

LOOKED_AT = frozenset(
    {
        "cifar10-preact-brief",
        "cifar10-resnet18",
        "cifar10-resnet18-all-to-all",
        "cifar10-resnet18-brief",
        "cifar10-resnet18-second",
        "cifar10-resnet18-third",
        "cifar10-resnet18-wanet",
        "cifar10-smallvgg",
        "cifar10-smallvgg-brief",
        "cifar10-smallvgg-sig",
        "cifar10-vgg16-blend",
        "cifar10-vgg16-brief",
        "cifar10-wrn-brief",
        "gtsrb-preact",
        "gtsrb-preact-brief",
        "gtsrb-resnet18",
        "gtsrb-resnet18-brief",
        "gtsrb-resnet18-second",
        "gtsrb-resnet18-wanet",
        "gtsrb-smallvgg",
        "gtsrb-smallvgg-blend",
        "gtsrb-smallvgg-second",
        "gtsrb-vgg16",
        "gtsrb-vgg16-brief",
        "gtsrb-vgg16-second",
        "gtsrb-wrn-brief",
        "tiny-resnet18-brief",
    }
)
"""Models of `recipes/small_models.py` that bounds or settings were chosen with."""


def chosen(found: Iterable[Record], **wanted: object) -> list[Record]:
    """Records of experiments with these fields, that are done."""
    return [
        r
        for r in found
        if r.status == "done"
        and all(getattr(r.experiment, key) == value for key, value in wanted.items())
    ]


def name(record: Record) -> str | None:
    """Which of `DEFAULTS` made the record; `NEAR` is shown of the small models only."""
    spec = record.experiment
    for known, own in DEFAULTS.items():
        if spec.method == known.partition(",")[0] and spec.settings == own:
            return None if known == NEAR and of_zoo(spec.model.label) else known
    return None


def usual(found: Iterable[Record]) -> list[Record]:
    """In the precision of the profile."""
    return [r for r in found if r.experiment.precision == SMALL.precision]


def plain(found: Iterable[Record]) -> list[Record]:
    """Repairs by one of `DEFAULTS` with the usual images."""
    return [r for r in chosen(found, task="removal", part="train", images=IMAGES) if name(r)]


def by(found: Iterable[Record], which: str) -> list[Record]:
    return [r for r in found if name(r) == which]


def once(found: Iterable[Record]) -> list[Record]:
    """One record a run: others of it only measured more."""
    return list({r.experiment.run.key: r for r in found}.values())


def attacked(record: Record) -> bool:
    return "asr" in record.before


def models(found: Iterable[Record]) -> list[str]:
    """Labels, the zoo first."""
    labels = {r.experiment.model.label for r in found}
    return sorted(labels, key=lambda label: (not of_zoo(label), label))


def of(found: Iterable[Record], model: str) -> list[Record]:
    return [r for r in found if r.experiment.model.label == model]


def drop(record: Record) -> float:
    return record.before["ca"] - record.after["ca"]


def floors(found: Iterable[Record]) -> dict[str, float]:
    """ASR of a clean model on the same triggered images, by label."""
    return {r.experiment.model.label: r.figures["floor"] for r in found if "floor" in r.figures}


def retuned(found: Iterable[Record]) -> list[Record]:
    """Repairs on the last draw whose models were re-tuned on poisoned images."""
    runs = chosen(found, task="removal", part="train", images=IMAGES, draw=LAST_DRAW)
    return [r for r in runs if "reactivated" in r.figures]


def least_woken(found: Iterable[Record]) -> dict[str, float]:
    """The lowest ASR, by label, that re-tuning leads to after a method that only prunes."""
    least: dict[str, float] = {}
    for record in retuned(found):
        if record.experiment.method.partition(":")[0] in PRUNE:
            model, asr = record.experiment.model.label, record.figures["reactivated"]
            least[model] = min(least.get(model, inf), asr)
    return least


def in_view(label: str) -> bool:
    """Whether a bound or setting was chosen with the model, or with others like it, in view."""
    own = label.removeprefix("models:")
    return of_zoo(label) or label.startswith(PUBLISHED) or own in LOOKED_AT


def of_zoo(label: str) -> bool:
    """Whether it is of the zoo, or of the benchmark, which trains what the zoo lacks."""
    return not label.startswith("models:")


def origin(record: Record) -> str:
    """Where the model comes from, one of `ORIGINS`."""
    return came_from(record.experiment.model.label)


def came_from(label: str) -> str:
    """Where the model of a label comes from, one of `ORIGINS`."""
    if of_zoo(label):
        return "zoo"
    if label.startswith(PUBLISHED):
        return "published"
    return "small, in view" if in_view(label) else "small, set aside"


def repairs(found: list[Record], method: str) -> dict[str, list[Record]]:
    """Of backdoored models by `origin`; those that have any."""
    runs = [r for r in once(by(plain(found), method)) if attacked(r)]
    groups = {where: [r for r in runs if origin(r) == where] for where in ORIGINS}
    return {where: some for where, some in groups.items() if some}


def scans(found: Iterable[Record]) -> list[Record]:
    """Scans with the usual settings, alone or as a default's first step; one a model and draw."""
    seen = [
        r
        for r in chosen(found, settings={}, part="train", images=IMAGES)
        if r.experiment.method in ("scan", "auto", FORMER) and r.figures.get("strength") is not None
    ]
    return list({(r.experiment.model.label, r.experiment.draw): r for r in seen}.values())


def is_clean(record: Record) -> bool:
    return record.experiment.model.attack == "clean"
