"""From the spec of a model to the model with its images and its trigger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reprune import demo
from reprune.attacks import Goal, read_trigger
from reprune.benchmark.extra import needed
from reprune.benchmark.settings import attack_of, training_of
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.classifier import Classifier
from reprune.crafting import craft_into, read_backdoor
from reprune.data import ImageSet, draw, read_images, read_parts, take
from reprune.defenses.auto_run import Run
from reprune.errors import ConfigurationError, DataError, ModelError
from reprune.models import LoadedModel, load_model, locate, read_card
from reprune.planning import Plan, describe_attack
from reprune.results import to_json
from reprune.sample import KnownTrigger
from reprune.types import Progress, silent

DEMO = "demo"
"""The data set that ships with the package: 500 training and 1,000 test images of CIFAR-10."""

SIZES = {"imagenet12": (224, 224), "gtsrb": (32, 32)}
"""Of data sets whose images come in many sizes: what they are resized to, height and width."""

MODELS = "models:"
"""Prefix of models that somebody else made, in the folder of `--models`."""


@dataclass(frozen=True)
class Subject:
    """One model with its images, on one device.

    Attributes:
        spec: what it is.
        classifier: the model.
        train, test: images.
        known: the trigger, for the figures only; `None` for a clean model.
    """

    spec: ModelSpec
    classifier: Classifier
    train: ImageSet
    test: ImageSet
    known: KnownTrigger | None

    def clean(self, experiment: Experiment) -> ImageSet:
        """The clean images that the method gets.

        Raises:
            ConfigurationError: of the test part, where all of it is measured on.
        """
        source = self.train if experiment.part == "train" else self._measured(experiment)[1]
        if not len(source):
            raise ConfigurationError(
                "clean images of the test part need test_images: all of it is measured on"
            )
        return draw(source, experiment.images, torch.Generator().manual_seed(experiment.draw))

    def measured(self, experiment: Experiment) -> ImageSet:
        """The test images that figures are measured on."""
        return self._measured(experiment)[0]

    def _measured(self, experiment: Experiment) -> tuple[ImageSet, ImageSet]:
        """These, and the others."""
        count = experiment.test_images
        if count is None or count >= len(self.test):
            return self.test, self.test.subset([])
        return take(self.test, count, torch.Generator().manual_seed(0))


class Subjects:
    """Models by spec: loaded, or trained once and kept.

    Args:
        data: folder with one folder a data set; not needed for the images that ship with the
            package, `demo`.
        cache: where trained models are kept.
        models: folders of models that somebody else made.
        device: where models and images are.

    Attributes:
        begun: what the last repair began with and the seconds that took, by the key of its
            beginning; the next one goes on from it if it begins alike.
    """

    def __init__(
        self,
        data: Path | None,
        cache: Path,
        models: Sequence[Path] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.data, self.cache, self.models = data, cache, models
        self.device = torch.device(device)
        self.begun: dict[str, tuple[Run, float]] = {}
        self._images: dict[str, tuple[ImageSet, ImageSet]] = {}

    def subject(self, spec: ModelSpec, *, progress: Progress = silent) -> Subject:
        """The model of a spec; it is trained where it is not there yet.

        Raises:
            DataError, ModelError, ConfigurationError: what the spec names is not there.
            RepruneError: the training failed.
        """
        folder = self.folder(spec, progress=progress)
        loaded = self._load(folder)
        train, test = self.images(spec.data)
        classifier = loaded.classifier.settle(train.pixels(slice(0, 2))).laid_out()
        return Subject(spec, classifier, train, test, known_trigger(folder, loaded))

    def classifier(self, spec: ModelSpec, *, progress: Progress = silent) -> Classifier:
        """The model alone, without its images; raises what `subject` raises."""
        return self._load(self.folder(spec, progress=progress)).classifier

    def _load(self, folder: Path) -> LoadedModel:
        loaded = load_model(folder)
        loaded.classifier.to(self.device)
        return loaded

    def folder(self, spec: ModelSpec, *, progress: Progress = silent) -> Path:
        """Where the model lies; trained first where it is not there yet."""
        if spec.source is not None:
            folder = given(spec.source, self.models)
            found = weights_digest(folder)
            if spec.sha256 is not None and found != spec.sha256:
                raise ModelError(
                    f"{spec.source} has other weights (sha256 {found[:16]}...) than the experiment "
                    f"was planned for ({spec.sha256[:16]}...); plan it again"
                )
            return folder
        folder = self.cache / spec.key
        self.cache.mkdir(parents=True, exist_ok=True)
        with needed("filelock").FileLock(folder.with_suffix(".lock")):  # one worker trains it
            if (folder / "card.json").exists():
                _check_made(spec, folder)
            else:
                self._make(spec, folder, progress)
        return folder

    def images(self, name: str) -> tuple[ImageSet, ImageSet]:
        """Training and test images of a data set, on the device.

        Raises:
            DataError: they are not there; the message says where they were looked for.
        """
        if name not in self._images:
            train, test = self._read(name)
            self._images[name] = train.to(self.device), test.to(self.device)
        return self._images[name]

    def _read(self, name: str) -> tuple[ImageSet, ImageSet]:
        if name == DEMO:
            folder = demo.folder()
            return read_images(folder / "clean.parquet"), read_images(folder / "test.parquet")
        if self.data is None:
            raise DataError(f"no images of {name}: say with --data where the data sets are")
        place = self.data / name
        if not place.exists():
            raise DataError(
                f"no images of {name}: looked for {place}; make a folder there with `train` and "
                "`test`, each a folder of class folders, a .parquet or an .npz file "
                "(docs/formats.md)"
            )
        return read_parts(place, size=SIZES.get(name))

    def _make(self, spec: ModelSpec, folder: Path, progress: Progress) -> None:
        train, test = self.images(spec.data)
        plan = Plan(
            name=spec.attack,
            attack=attack_of(spec),
            regime=spec.regime,
            training=training_of(spec),
            arch=spec.arch,
            arch_args={} if spec.width is None else {"width": spec.width},
            seed=spec.seed,
        )
        clean = None
        if spec.start is not None:
            clean = self._load(self.folder(spec.start, progress=progress))
        elif plan.needs_clean_model:
            raise ConfigurationError(
                f"{spec.label} needs a clean model to start from; its spec names none"
            )
        craft_into(
            folder,
            plan,
            train,
            test,
            clean=clean,
            source=spec.data,
            clean_source=spec.start.label if spec.start is not None else "",
            progress=progress,
        )


def given(source: str, models: Sequence[Path]) -> Path:
    """The folder of `zoo:NAME` or `models:NAME`.

    Raises:
        ConfigurationError: no folder of models was given.
        ModelError, UnknownNameError: no such model.
    """
    if not source.startswith(MODELS):
        return locate(source)
    if not models:
        raise ConfigurationError(f"{source} is looked for in --models, which was not given")
    places = [folder / source.removeprefix(MODELS) for folder in models]
    for place in places:
        if place.is_dir():
            return place
    raise ModelError(f"no model {source}: looked for {', '.join(map(str, places))}")


def _check_made(spec: ModelSpec, folder: Path) -> None:
    """Raises `ModelError` if a kept model was made by a version with other defaults."""
    card = read_card(folder / "card.json").extra
    for what, said, now in (
        ("attack", card["attack"]["parameters"], describe_attack(attack_of(spec))),
        ("training", card["training"], to_json(training_of(spec))),
    ):
        for name, value in json.loads(json.dumps(now)).items():
            if said.get(name, value) != value:
                raise ModelError(
                    f"the model that is kept in {folder} was made with {what} {name} = "
                    f"{said[name]}, which is {value} by now: remove its folder, and it is made anew"
                )


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights file in a model's folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def known_trigger(folder: Path, loaded: LoadedModel) -> KnownTrigger | None:
    """The trigger that lies beside a model, `None` where there is none."""
    said = loaded.card.extra
    if "goal" in said and "trigger" in said:
        return read_backdoor(folder)
    file = folder / "trigger.npz"
    if not file.exists() or "target_label" not in said:
        return None
    return KnownTrigger(read_trigger(file), Goal(said["target_label"]), file.name)
