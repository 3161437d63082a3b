"""Of very many classes, those that a scan searches: short searches say which are worth it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection.families import ALONE_FAMILIES
from reprune.detection.inversion import Inversion, smallest_masks
from reprune.detection.joint import Joint, Recovered, invert_jointly
from reprune.evaluation import flip_rate
from reprune.types import Progress

MANY = 64
"""All classes are searched up to so many."""

FIRST, OTHERS = 3, 36
"""Classes that are searched of more: the first ones of each short search, and others by chance."""

IMAGES = 8
"""A step, in short searches."""

PATCH_STEPS, STEPS = 30, 20
"""Of a short search for patches, and of those of `ALONE_FAMILIES`."""

Ease = tuple[float, float]
"""How hard a class is to lead to, the lower the easier: the size of its trigger; where none was
found infinity, and minus the flip rate of what the search ended with (0 for patches)."""


def count(classes: int) -> int:
    """How many of so many classes are searched at most."""
    return classes if classes <= MANY else min(classes, FIRST * (1 + len(ALONE_FAMILIES)) + OTHERS)


def passes(images: int, classes: int) -> float:
    """Images through the network, over `images`, to narrow so many classes."""
    if classes <= MANY:
        return 0.0
    steps = PATCH_STEPS + len(ALONE_FAMILIES) * STEPS
    return steps * IMAGES * classes / images + len(ALONE_FAMILIES) * classes


def short_searches(
    model: Classifier,
    data: ImageSet,
    patches: Inversion,
    settings: Joint,
    *,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, list[Ease]]:
    """How hard each class is to lead to after a few steps, by family.

    A class that a backdoor leads to is among the first of one family or another.

    Args:
        model: the classifier; it is not changed.
        data: clean images.
        patches, settings: of the whole searches.
        generator: of all random numbers.
    """
    classes = range(model.num_classes)
    found = smallest_masks(
        model,
        data,
        classes,
        replace(patches, steps=PATCH_STEPS, images=IMAGES),
        generator=generator,
        progress=progress,
        phase="narrow patch",
    )
    eases = {"patch": _eases(found.sizes, found.flips)}
    for family in ALONE_FAMILIES:
        some = invert_jointly(
            model,
            [model],
            data,
            classes,
            family,
            replace(settings, steps=STEPS, images=IMAGES, weight=0.0),
            generator=generator,
            progress=progress,
            phase=f"narrow {family}",
        )
        eases[family] = _eases(some.sizes, _flips(model, data, some))
    return eases


def _flips(model: Classifier, data: ImageSet, found: Recovered) -> list[float]:
    """By class, the flip rate of what is no trigger yet; 0 where the size already tells."""
    return [
        0.0 if math.isfinite(size) else flip_rate(model, data, trigger, label)
        for label, trigger, size in zip(found.classes, found.triggers, found.sizes, strict=True)
    ]


def _eases(sizes: Sequence[float], flips: Sequence[float]) -> list[Ease]:
    return [
        (math.inf if math.isnan(size) else size, -flip)
        for size, flip in zip(sizes, flips, strict=True)
    ]


def chosen(eases: Sequence[Sequence[Ease]], generator: torch.Generator) -> list[int]:
    """The `FIRST` classes of each search, and `OTHERS` that are drawn among the rest; in order.

    The others tell what is usual.
    """
    classes = range(len(eases[0]))
    first = {k for ease in eases for k in sorted(classes, key=ease.__getitem__)[:FIRST]}
    order = torch.randperm(len(classes), generator=generator).tolist()
    return sorted([*first, *[k for k in order if k not in first][:OTHERS]])
