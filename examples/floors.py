"""What models without a backdoor answer to triggered images: the floor of each trigger.

    python examples/floors.py --data DIR --models PLACE [PLACE ...] --clean PLACE [PLACE ...]
        [--output docs/results/floors.jsonl]

A PLACE is a model of the zoo or the folder of one; which of the data sets in `--data` it is of, its
name says. The trigger of each of `--models` is shown to those of the `--clean` ones that are of its
data, on all test images; no repair is asked for less than what these answer. Where the trigger
hangs on a seed alone, as that of A-Blend, the model that shows it may be trained for a moment: so
it was for `gtsrb-wrn-a-blend`. In float32; what has a record in the output is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from auto_once import keep, opened, source
from results_page import records

from reprune.benchmark.removal import percent
from reprune.benchmark.subjects import known_trigger
from reprune.data import read_parts
from reprune.models import locate


def floor(place: str, clean: str, data: Path) -> Mapping[str, object]:
    """The record of one trigger on one clean model."""
    train, test = read_parts(data / source(Path(place).name))
    known = known_trigger(locate(place), opened(place, train)[0])
    if known is None:
        raise SystemExit(f"{place}: its trigger is not known")
    rates = percent(opened(clean, train)[1], test, known)
    return {
        "model": Path(place).name,
        "clean": Path(clean).name,
        "target": known.goal.target,
        "tested": len(test),
        "ca": rates["ca"],
        "floor": rates["asr"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--clean", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--output", type=Path, default=Path("docs/results/floors.jsonl"))
    args = parser.parse_args()
    done = {(record["model"], record["clean"]) for record in records(args.output)}
    for place in args.models:
        for clean in args.clean:
            same = source(Path(place).name) == source(Path(clean).name)
            if same and (Path(place).name, Path(clean).name) not in done:
                keep(floor(place, clean, args.data), args.output)


if __name__ == "__main__":
    main()
