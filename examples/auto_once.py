"""What `auto` does to one model whose trigger is known: what the studies of it record."""

from __future__ import annotations

import time

import torch

from reprune.benchmark.removal import percent
from reprune.classifier import Classifier
from reprune.data import ImageSet, draw
from reprune.defenses import Auto
from reprune.sample import KnownTrigger


def repaired(
    model: Classifier, train: ImageSet, test: ImageSet, known: KnownTrigger | None, seed: int = 0
) -> dict[str, object]:
    """The verdict on the model, and its figures before and after; on 500 images of draw `seed`."""
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
    }
