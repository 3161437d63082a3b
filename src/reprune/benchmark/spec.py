"""What an experiment is: a frozen spec, named by the hash of everything in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from reprune.planning import Regime
from reprune.precision import Precision
from reprune.results import to_json

FORMAT = 1
"""Of specs, records and stores; higher where a change of meaning must not reuse old records."""

Selection = Literal["defender", "fixed", "oracle"]
"""Who chose how much to prune.

`defender`: the method itself, from clean images; `fixed`: a number given beforehand; `oracle`: the
best number by the attack success rate on test images, which no defender has.
"""

Task = Literal["removal", "detection", "filtering"]

Metric = Literal["figures", "floor", "reactivation"]
"""What is measured.

`figures`: CA, ASR and RA; `floor`: ASR of a clean model of the same architecture on the same
triggered images; `reactivation`: ASR after a few poisoned images re-tuned the model, and under a
trigger perturbed by queries alone.
"""

Part = Literal["train", "test"]
"""Of a data set, that clean images are drawn from."""

NONE = "none"
"""The method of the row "no defence"."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: trained by these settings, or, with `source`, made before and given.

    Attributes:
        data: folder of the images below the data folder, with `train` and `test` parts.
        attack, parameters: as `make_attack` takes them; "clean" for none.
        arch, width: architecture, and its width where it has one.
        regime: `scratch` starts from random weights, `implant` from `start`.
        start: the clean model to implant into, or that the attack is made against.
        training: fields of `Training` that differ from its defaults.
        seed: of the training.
        source, sha256: `zoo:NAME` or `models:NAME`, and the digest of its weights: other weights
            under the same name are another model.
    """

    data: str = "cifar10"
    attack: str = "clean"
    parameters: dict[str, Any] = field(default_factory=dict)
    arch: str = "resnet18"
    width: float | None = None
    regime: Regime = "scratch"
    start: ModelSpec | None = None
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    source: str | None = None
    sha256: str | None = None

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that name the model."""
        return digest(self)

    @property
    def label(self) -> str:
        """For people: `zoo:badnets`, or `badnets resnet18-16 cifar10 seed 0`."""
        if self.source is not None:
            return self.source
        arch = self.arch if self.width is None else f"{self.arch}-{self.width:g}"
        given = "".join(f" {key}={value}" for key, value in self.parameters.items())
        return f"{self.attack}{given} {arch} {self.data} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run of one method on one model.

    Attributes:
        model: the model.
        task: `removal` repairs it, `detection` examines it, `filtering` looks for triggered images.
        method: a name of the registries of defences, detectors or filters, or "none".
        settings: settings that differ from the method's own, by dotted name, such as
            `{"pruning.by": "fraction", "pruning.amount": 0.05}`.
        images, draw: how many clean images the method gets, and the seed that draws them.
        part: where they are from: the training images of the model, or test images that it has not
            seen and that nothing is measured on.
        seed: of the method's randomness.
        selection: who chose how much to prune.
        metrics: what is measured.
        test_images: of the test part; `None` for all.
        precision: of the method and of the measurement.
    """

    model: ModelSpec
    task: Task = "removal"
    method: str = NONE
    settings: dict[str, Any] = field(default_factory=dict)
    images: int = 500
    draw: int = 0
    part: Part = "train"
    seed: int = 0
    selection: Selection = "defender"
    metrics: tuple[Metric, ...] = ("figures",)
    test_images: int | None = None
    precision: Precision = "auto"

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that name the experiment and its record."""
        return digest(self)

    @property
    def outcome(self) -> Experiment:
        """The experiment without what else is measured: those that share it repair alike."""
        return replace(self, metrics=("figures",))

    @property
    def run(self) -> Experiment:
        """The experiment whose run of the method serves this one too.

        A method that ranks channels need not run again to prune another number of them, nor any
        method for more to be measured.
        """
        if self.selection == "defender":
            return self.outcome
        settings = {k: v for k, v in self.settings.items() if not k.startswith("pruning.")}
        return replace(self.outcome, settings=settings, selection="defender")

    @property
    def label(self) -> str:
        """For people."""
        given = "".join(f" {key}={value}" for key, value in self.settings.items())
        chosen = "" if self.selection == "defender" else f" ({self.selection})"
        unseen = "" if self.part == "train" else " of test images"
        return f"{self.model.label}: {self.method}{given}{chosen}, draw {self.draw}{unseen}"


def digest(spec: ModelSpec | Experiment) -> str:
    """16 hexadecimal digits of SHA-256 over the spec as canonical JSON and `FORMAT`.

    Fields that came later are left out where they have their default, so that old keys stay.
    """
    said = to_json(spec)
    if said.get("part") == "train":
        del said["part"]
    return hashed([FORMAT, type(spec).__name__, said])


def hashed(said: Any) -> str:
    """16 hexadecimal digits of SHA-256 over plain data as canonical JSON."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def by_run(experiments: Iterable[Experiment]) -> list[list[Experiment]]:
    """Experiments in groups that one run of the method serves, in their order."""
    found: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        found.setdefault(experiment.run.key, []).append(experiment)
    return list(found.values())
