"""What `auto` does to one model whose trigger is known: what the studies of it record."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from reprune.benchmark.removal import percent
from reprune.classifier import Classifier
from reprune.data import ImageSet, draw
from reprune.defenses import Auto
from reprune.defenses.trigger_bank import INNOCENTS
from reprune.detection import FamilyName, Joint, invert_jointly
from reprune.sample import KnownTrigger

STARTS = 4
"""Filters that are sought for the suspect."""


def repaired(
    model: Classifier, train: ImageSet, test: ImageSet, known: KnownTrigger | None, seed: int = 0
) -> dict[str, object]:
    """The verdict on the model, and its figures before and after; on 500 images of draw `seed`.

    Of a repaired one also how large filters are that lead to the suspect, and to others.
    """
    before, began = percent(model, test, known), time.perf_counter()
    clean = draw(train, 500, torch.Generator().manual_seed(seed))
    result = Auto()(model, clean, generator=torch.Generator().manual_seed(seed))
    seconds = round(time.perf_counter() - began)
    assert result.scanned is not None
    finding = result.scanned.finding
    return {
        "verdict": finding.verdict,
        "strength": finding.strength,
        "suspect": finding.suspect,
        "signs": [[s.search, s.label, round(s.strength, 3)] for s in finding.signs],
        **{f"{rate} before": share for rate, share in before.items()},
        **{f"{rate} after": share for rate, share in percent(result.model, test, known).items()},
        "notes": result.trace.notes,
        "seconds": seconds,
        **({} if finding.suspect is None else filters(result.model, clean, finding.suspect)),
    }


def filters(model: Classifier, clean: ImageSet, suspect: int) -> dict[str, object]:
    """Sizes of filters, in the model alone: several to the suspect, one to each of some others."""
    others = [k for k in range(model.num_classes) if k != suspect][:INNOCENTS]
    sizes = sought(model, clean, [suspect] * STARTS + others, "filter")
    return {"filters": sizes[:STARTS], "filters of others": sizes[STARTS:]}


def sought(
    model: Classifier, clean: ImageSet, classes: Sequence[int], family: FamilyName, seed: int = 0
) -> list[float | None]:
    """Sizes of the smallest triggers of a family that lead to these classes in the model alone."""
    with model.evaluating():
        found = invert_jointly(
            model,
            [model],
            clean,
            classes,
            family,
            Joint(weight=0.0),
            generator=torch.Generator().manual_seed(seed),
        )
    return [size if math.isfinite(size) else None for size in found.sizes]
