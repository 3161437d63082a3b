"""The two sizes that every table comes in: the paper's, and one for two cores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from reprune.attacks import find_attack, make_attack
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.benchmark.subjects import MODELS, weights_digest
from reprune.errors import ModelError, UnknownNameError
from reprune.models import read_card, zoo_models
from reprune.planning import Regime
from reprune.precision import Precision
from reprune.training import Training

NARROW = {"resnet18": 16, "vgg19": 16, "mobilenetv2": 0.5, "efficientnetb0": 0.5}
"""Widths of the small profile: channels of the first stage, or a factor."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How large the experiments of a table are.

    Attributes:
        name: "small" or "paper".
        widths: of the networks by architecture; others have their own.
        seeds: how many models of each kind are trained.
        draws: how many draws of the defence data each method gets.
        test_images: that CA and ASR are measured on; `None` for all.
        precision: of methods and measurement.
        regime, training: how models are attacked.
        clean_training: how the clean models are trained.
        preset: of the rival methods; "" for their defaults, ":paper" for the published settings.
        zoo: whether models of the zoo are taken where it has them.
        others: models that somebody else made; tables of every method take these, too.
    """

    name: str
    widths: Mapping[str, float]
    seeds: int
    draws: int
    test_images: int | None
    precision: Precision
    regime: Regime
    training: Training
    clean_training: Training
    preset: str
    zoo: bool
    others: tuple[ModelSpec, ...] = ()

    def model(
        self,
        attack: str,
        seed: int = 0,
        *,
        data: str = "cifar10",
        arch: str = "resnet18",
        parameters: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """The spec of an attacked model, or with "clean" of a clean one."""
        if self.zoo and seed == 0 and not parameters and (data, arch) == ("cifar10", "resnet18"):
            found = zoo_model(attack)
            if found is not None:
                return found
        clean = attack == "clean"
        training = self.clean_training if clean else self.training
        if data == "gtsrb":
            training = replace(training, mirror=False)  # traffic signs have sides
        kind = find_attack(attack)
        regime: Regime = "implant" if kind.implants_only else self.regime
        wants = regime == "implant" or make_attack(attack, **(parameters or {})).wants_surrogate
        return ModelSpec(
            data=data,
            attack=attack,
            parameters=dict(parameters or {}),
            arch=arch,
            width=self.widths.get(arch),
            regime="scratch" if clean else regime,
            start=self.model("clean", seed, data=data, arch=arch) if wants and not clean else None,
            training=changed(training),
            seed=seed,
        )

    def models(self, attack: str, **settings: Any) -> tuple[ModelSpec, ...]:
        """The models of all seeds."""
        return tuple(self.model(attack, seed, **settings) for seed in range(self.seeds))

    def experiments(
        self, models: tuple[ModelSpec, ...], method: str, **settings: Any
    ) -> tuple[Experiment, ...]:
        """One experiment a model and draw; the method's seed is that of the draw."""
        draws = 1 if method == "none" else self.draws
        return tuple(
            Experiment(
                model=model,
                method=method,
                draw=draw,
                seed=draw,
                **{"test_images": self.test_images, "precision": self.precision, **settings},
            )
            for model in models
            for draw in range(draws)
        )

    def rival(self, method: str) -> str:
        """The name of a rival method with this profile's settings."""
        return method + self.preset


SMALL = Profile(
    name="small",
    widths=NARROW,
    seeds=1,
    draws=3,
    test_images=2000,
    precision="bfloat16",
    regime="implant",
    training=Training(epochs=4, lr=0.05, precision="bfloat16"),
    clean_training=Training(epochs=10, precision="bfloat16"),
    preset="",
    zoo=True,
)
PAPER = Profile(
    name="paper",
    widths={},
    seeds=3,
    draws=3,
    test_images=None,
    precision="auto",
    regime="scratch",
    training=Training.paper(),
    clean_training=Training.paper(),
    preset=":paper",
    zoo=False,
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in (SMALL, PAPER)}


def find_profile(name: str) -> Profile:
    """The profile of a name.

    Raises:
        UnknownNameError: no such profile; the message lists the known ones.
    """
    if name not in PROFILES:
        raise UnknownNameError(f"unknown profile {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]


@cache
def zoo_model(name: str) -> ModelSpec | None:
    """The spec of a model of the zoo, from its card; `None` where the zoo has no such model."""
    if name not in zoo_models():
        return None
    folder = zoo_models()[name]
    card = read_card(folder / "card.json")
    made = card.extra
    defaults = find_attack(name)
    own = {f.name: f.default for f in fields(defaults)}
    stored = made["attack"]["parameters"]
    return ModelSpec(
        data=str(made["images"]["source"]),
        attack=name,
        parameters={k: v for k, v in stored.items() if k in own and own[k] != v},
        arch=str(card.arch),
        width=(card.arch_args or {}).get("width"),
        regime=made["regime"],
        start=None if name == "clean" else zoo_model("clean"),
        seed=int(made["seed"]),
        source=f"zoo:{name}",
        sha256=weights_digest(folder),
    )


def given_models(
    folders: Iterable[Path], images: Mapping[str, str] | None = None
) -> tuple[ModelSpec, ...]:
    """The specs of all models with a card in these folders.

    Args:
        folders: each with one folder a model.
        images: folder of the images by the `dataset` of the card, where they differ. Cards that
            `reprune attack` wrote name the folder itself.

    Raises:
        ModelError: a bad card, or one that names no data set.
    """
    specs = []
    for place in (path.parent for folder in folders for path in sorted(folder.glob("*/card.json"))):
        card = read_card(place / "card.json")
        said = card.extra
        made: dict[str, Any] = said["attack"] if isinstance(said.get("attack"), dict) else {}
        named = str(said.get("dataset") or "")
        data = (images or {}).get(named, named) or dict(said.get("images") or {}).get("source")
        if not data:
            raise ModelError(f"the card in {place} names no data set: add `dataset`")
        clean = made.get("name") == "clean" or said.get("backdoored") is False
        specs.append(
            ModelSpec(
                data=str(data),
                attack="clean" if clean else str(made.get("name", "other")),
                arch=str(card.arch),
                width=(card.arch_args or {}).get("width"),
                regime=said.get("regime", "scratch"),
                source=MODELS + place.name,
                sha256=weights_digest(place),
            )
        )
    return tuple(specs)


def changed(training: Training) -> dict[str, Any]:
    """The fields of a training that differ from the defaults."""
    usual = Training()
    values = {f.name: getattr(training, f.name) for f in fields(training)}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}
