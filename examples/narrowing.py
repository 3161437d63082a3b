"""Does a short search of many classes keep the one that the backdoor leads to?

    python examples/narrowing.py --data DIR --models PLACE [PLACE ...]
        [--output docs/results/narrowing.jsonl]

A PLACE is a model of the zoo or the folder of one whose backdoor leads to one class; which of the
data sets in `--data` it is of, its name says. The record says how many classes come before that one
in each short search (`reprune.detection.narrowing`); no defender knows it. 500 images of one draw,
in float32; models with a record are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from told import Told, run, seeded

from reprune.detection import Scan
from reprune.detection.narrowing import short_searches
from reprune.types import silent


def study(place: str, data: Path) -> Iterator[dict[str, object]]:
    """One record."""
    told, scan = Told.of(place, data), Scan()
    assert scan.joint is not None
    began = time.perf_counter()
    with told.model.evaluating():
        found = short_searches(
            told.model,
            told.clean,
            scan.cleanse.inversion,
            scan.joint,
            generator=seeded(),
            progress=silent,
        )
    yield {
        "model": told.name,
        "target": told.target,
        "classes": told.model.num_classes,
        "before": {
            family: sum(ease < eases[told.target] for ease in eases)
            for family, eases in found.items()
        },
        "seconds": round(time.perf_counter() - began),
    }


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], study, "narrowing")
