"""What the default does to a model today; nobody tells it anything.

    python examples/default.py --data DIR --models PLACE [PLACE ...] [--draws 0 1 2]
        [--output docs/results/default.jsonl]

A PLACE is a model of the zoo (`zoo:cl`) or the folder of one; which of the data sets in `--data` it
is of, its name says. `auto` gets 500 images, by default those of draw 0, and the model that it
returns is tested on all test images, and re-tuned on a few poisoned ones. In float32; what has a
record in the output is left out: runs that are made anew have a file of their own, and are appended
by whole draws, so that none is chosen by what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from auto_once import IMAGES, compared, opened, purified, source
from told import run, seeded

from reprune.benchmark.reactivation import retuned
from reprune.benchmark.removal import percent
from reprune.benchmark.subjects import known_trigger
from reprune.data import draw, read_parts
from reprune.defenses import Auto
from reprune.models import locate


def study(place: str, data: Path, seed: int) -> Iterator[Mapping[str, object]]:
    """One record: the verdict, figures before and after; of a known trigger also *woken*."""
    train, test = read_parts(data / source(Path(place).name))
    loaded, model = opened(place, train)
    known = known_trigger(locate(place), loaded)
    result, record = purified(model, draw(train, IMAGES, seeded(seed)), seed)
    record |= {
        "draw": seed,
        "looks": Auto().search.looks,
        "tested": len(test),
        "target": known and known.goal.target,
        **compared(model, result.model, test, known),
    }
    if known is not None:
        woken = retuned(result.model, train, known, generator=seeded(seed))
        record["woken"] = percent(woken, test, known)["asr"]
    yield {"model": Path(place).name, **record}


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], study, "default", drawn=True)
