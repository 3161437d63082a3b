"""What every method costs: its time in training epochs, and the passes that it makes.

    python benchmarks/methods.py [--model zoo:badnets] [--data CLEAN] [--methods NAME ...]
        [--precision auto|float32|bfloat16]
        [--output docs/results/methods-cost.jsonl]

One training epoch (forward, backward and step on the 500 defence images, in batches of 128) is the
unit; it is timed before and after each method in the same run. Passes are images through the
network, counted, over the number of images; what the method says it takes at most stands beside it.
Where a method reports steps, each has its share of both, by the step's first word.
The precision is by default what the command line takes: bfloat16 where the device has units for it.
Filters examine the 500 images themselves, and ABL trains anew on them.
Without `--data` the images are the clean ones that ship with the package.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import finish, timed
from torch import Tensor, nn

from reprune.benchmark.epoch import training_epoch
from reprune.data import ImageSet, draw, read_images
from reprune.defense import Defense
from reprune.defenses import ABL, DEFENSES, TRAINING_DEFENSES, make_defense
from reprune.demo import folder
from reprune.detection import DETECTORS, Detector, make_detector
from reprune.detection.filtering import Filter
from reprune.detection.filters import FILTERS, make_filter
from reprune.errors import RepruneError
from reprune.models import load_model
from reprune.precision import autocast, fastest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="zoo:badnets")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--output", type=Path, help="append the results to this JSON lines file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args()
    device = torch.device(args.device)
    precision = fastest(device) if args.precision == "auto" else args.precision
    model = load_model(args.model).classifier.to(device).to(memory_format=torch.channels_last)
    images = read_images(args.data or folder() / "clean.parquet")
    clean = draw(images, args.images, torch.Generator().manual_seed(0)).to(device)
    seen = Counter(model.network)

    epoch = partial(training_epoch, model, clean)
    jobs: dict[str, tuple[Callable[..., Any], Iterable[str]]] = {
        "purify": (make_defense, {**DEFENSES, **TRAINING_DEFENSES}),
        "scan": (make_detector, DETECTORS),
        "filter": (make_filter, FILTERS),
    }
    with autocast(device, precision):
        epoch()
        for job, (make, registry) in jobs.items():
            for name in registry:
                if ":" in name or (args.methods and name not in args.methods):
                    continue
                record = cost(make(name), model.num_classes, clean, model, epoch, seen)
                said = {"command": job, "method": name, "model": args.model, "precision": precision}
                finish({**said, **record}, device, args.output)


def cost(
    method: Defense | ABL | Detector | Filter,
    classes: int,
    clean: ImageSet,
    model: nn.Module,
    epoch: Callable[[], None],
    seen: Counter,
) -> dict[str, object]:
    """One record: seconds in epochs, passes counted and announced."""
    device = clean.device
    before = [timed(epoch, device) for _ in range(3)]
    error, steps = None, Steps(seen)

    def job() -> None:
        nonlocal error
        try:
            given = (clean, clean) if isinstance(method, Filter) else (clean,)
            generator = torch.Generator().manual_seed(0)
            method(model, *given, generator=generator, progress=steps)  # type: ignore[arg-type]
        except RepruneError as failure:
            error = str(failure)

    seconds = timed(job, device)
    passes = seen.images / len(clean)
    steps("rest", 1, 1)
    after = [timed(epoch, device) for _ in range(3)]
    unit = statistics.median(before + after)
    return {
        "images": len(clean),
        "time / training epoch": round(seconds / unit, 1),
        "passes": round(passes, 1),
        "passes at most": round(method.passes(len(clean), classes), 1),
        "seconds": round(seconds, 2),
        "epoch seconds": round(unit, 3),
        "steps": {
            name: {"seconds": round(spent, 2), "passes": round(images / len(clean), 1)}
            for name, (spent, images) in steps.spent.items()
        },
        **({"error": error} if error else {}),
    }


class Steps:
    """A `Progress`: gives the time and the images since the last call to the step of this one."""

    def __init__(self, seen: Counter) -> None:
        self.seen, self.spent = seen, dict[str, tuple[float, int]]()
        seen.images = self.images = 0
        self.start = time.perf_counter()

    def __call__(self, phase: str, done: int, total: int, /, **figures: float) -> None:
        name = phase.split()[0]
        now, images = time.perf_counter(), self.seen.images
        seconds, count = self.spent.get(name, (0.0, 0))
        self.spent[name] = seconds + now - self.start, count + images - self.images
        self.start, self.images = now, images


class Counter:
    """Counts the images that enter the network; copies of the network count too."""

    def __init__(self, network: nn.Module) -> None:
        self.images = 0
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        first.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0])

    def __deepcopy__(self, memo: dict[int, object]) -> Counter:
        return self


if __name__ == "__main__":
    main()
