"""The real models that the comparisons run on: the zoo, published ones, clean ones."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reprune import __version__
from reprune.attacks import Goal, read_trigger
from reprune.benchmark.removal import percent
from reprune.crafting import read_backdoor
from reprune.data import ImageSet, draw, read_images
from reprune.defense import Defense, Purified
from reprune.errors import RepruneError
from reprune.models import LoadedModel, load_model, zoo_models
from reprune.report import hardware
from reprune.sample import KnownTrigger

IMAGES = 500
DATA = {"cifar10": "cifar10_lossless", "gtsrb": "gtsrb"}
"""Folder of the images by the data set that a published model's card names."""


@dataclass(frozen=True)
class Subject:
    """One model with its images. The trigger is for figures only, `None` for a clean model."""

    name: str
    loaded: LoadedModel
    train: ImageSet
    test: ImageSet
    known: KnownTrigger | None

    def clean(self, seed: int) -> ImageSet:
        """The defence data of one draw."""
        return draw(self.train, IMAGES, torch.Generator().manual_seed(seed))

    def figures(self, model: Any) -> dict[str, float]:
        """CA, and for a backdoored model ASR and RA, in percent, on the test images."""
        return percent(model, self.test, self.known)


def repair(subject: Subject, defense: Defense, draw: int) -> tuple[dict[str, Any], Purified | None]:
    """What the record of every repair holds, with seconds of the processor, and the outcome.

    Where the method refuses the outcome is `None` and the record holds its error.
    """
    record: dict[str, Any] = {"before": subject.figures(subject.loaded.classifier)}
    start = time.process_time()
    try:
        result = defense(
            subject.loaded.classifier,
            subject.clean(draw),
            generator=torch.Generator().manual_seed(draw),
        )
    except RepruneError as error:
        return record | {"error": f"{type(error).__name__}: {error}"}, None
    seconds = time.process_time() - start
    return record | {
        "after": subject.figures(result.model),
        "pruned": sum(len(mask.pruned) for mask in result.trace.masks),
        "seconds": round(seconds, 1),
        "notes": list(result.trace.notes),
    }, result


class Subjects:
    """All models by name; images are read once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.data: Path = args.data
        self.test_images: int = args.test_images
        self.folders: dict[str, Path] = {f"zoo:{name}": f for name, f in zoo_models().items()}
        for kind, root in (("published", args.models), ("clean", args.clean)):
            if root is not None:
                folders = sorted(path.parent for path in root.glob("*/card.json"))
                self.folders |= {f"{kind}:{folder.name}": folder for folder in folders}
        self._images: dict[str, tuple[ImageSet, ImageSet]] = {}

    def __getitem__(self, name: str) -> Subject:
        folder = self.folders[name]
        kind = name.partition(":")[0]
        loaded = load_model(str(folder))
        known = None
        if kind == "published":
            extra = loaded.card.extra
            images = DATA[extra["dataset"]]
            trigger = read_trigger(folder / "trigger.npz")
            known = KnownTrigger(trigger, Goal(extra["target_label"]), "trigger.npz")
        else:
            images = "gtsrb" if "gtsrb" in name else "cifar10"
            if (folder / "trigger.npz").exists() or (folder / "trigger.safetensors").exists():
                known = read_backdoor(str(folder))
        if images not in self._images:
            train, test = (
                read_images(self.data / images / f"{part}.parquet") for part in ("train", "test")
            )
            test = draw(test, self.test_images, torch.Generator().manual_seed(0))
            self._images[images] = train, test
        return Subject(name, loaded, *self._images[images], known)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that the comparisons share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="published models")
    parser.add_argument("--clean", type=Path, help="clean models, see recipes/small_models.py")
    parser.add_argument("--only", nargs="*", help="names of models, e.g. zoo:badnets")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th")
    parser.add_argument("--precision", default="float32", help="bfloat16 where AMX is")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    return parser


class Store:
    """Records as JSON lines; what is there is not run again."""

    def __init__(self, path: Path, *keys: str, precision: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.keys, self.precision = path, keys, precision

    def records(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def missing(self, jobs: list[dict[str, Any]], shard: str) -> Iterator[dict[str, Any]]:
        """The jobs of this shard without a record, looked up anew before each."""
        index, count = map(int, shard.split("/"))
        for job in jobs[index::count]:
            done = {tuple(record[key] for key in self.keys) for record in self.records()}
            if tuple(job[key] for key in self.keys) not in done:
                yield job

    def add(self, record: Mapping[str, Any]) -> None:
        circumstances = {
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "version": __version__,
            "hardware": hardware(),
        }
        line = json.dumps({**record, **circumstances})
        with self.path.open("a") as lines:
            lines.write(line + "\n")
        print(line, flush=True)
