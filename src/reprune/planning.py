"""What is to be made of an attack: the plan, and everything that can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reprune.attacks import Attack
from reprune.attacks.wrapping import WrappingAttack
from reprune.classifier import Classifier
from reprune.data import ImageSet, channel_statistics
from reprune.errors import ConfigurationError, DataError
from reprune.models import LoadedModel, build_network
from reprune.results import to_json
from reprune.training import Training

Regime = Literal["scratch", "implant"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be made.

    Attributes:
        name: name of the attack.
        attack: the attack with its parameters.
        regime: `scratch` starts from random weights, `implant` from a clean trained model.
        training: of the backdoored model.
        clean_training: of the clean model, where one is needed and none is given.
        arch, arch_args: what `build_network` takes; not used where a clean model is given to
            implant into.
        mean, std: statistics of the preprocessing; those of the training images by default.
        seed: of all randomness.
        half: store the weights as float16; the figures are those of the stored weights.
    """

    name: str
    attack: Attack
    regime: Regime = "scratch"
    training: Training = field(default_factory=Training)
    clean_training: Training = field(default_factory=Training)
    arch: str = "resnet18"
    arch_args: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    seed: int = 0
    half: bool = False

    @property
    def needs_clean_model(self) -> bool:
        """Whether the attack starts from, or is made against, a clean model."""
        return self.regime == "implant" or self.attack.wants_surrogate


def _classes(train: ImageSet, test: ImageSet) -> int:
    highest = max(int(data.labels.max()) for data in (train, test) if len(data))
    return max(2, len(train.class_names), highest + 1)


def check_plan(plan: Plan, train: ImageSet, test: ImageSet, clean: LoadedModel | None) -> int:
    """Everything that can be wrong, before any training; returns the number of classes.

    Raises:
        ConfigurationError, DataError, UnknownNameError, MissingDependencyError: what is wrong.
    """
    classes = clean.classifier.num_classes if clean else _classes(train, test)
    plan.training.check()
    plan.attack.check(train, classes)
    if not len(test) or int(test.labels.min()) < 0 or int(test.labels.max()) >= classes:
        raise DataError(f"test images are needed, with labels in 0..{classes - 1}")
    if plan.attack.goal is not None and not plan.attack.goal.victims(test.labels).any():
        raise DataError(f"no test image shows whether the attack works ({plan.attack.goal})")
    if (plan.mean is None) != (plan.std is None):
        raise ConfigurationError("mean and std go together: give both --mean and --std, or neither")
    if plan.regime == "scratch" and plan.attack.implants_only:
        raise ConfigurationError(
            f"{plan.attack.title} starts from a clean model: use the regime implant"
        )
    if clean is None or plan.regime == "scratch":
        start = Classifier(_network(plan, classes), num_classes=classes).to(train.device)
    else:
        start = clean.classifier
    if plan.attack.wants_surrogate:
        plan.attack.check_network(start, train)
    if clean is None:
        return classes
    if plan.regime == "scratch" and not plan.attack.wants_surrogate:
        raise ConfigurationError(
            f"{plan.attack.title} from scratch uses no clean model: use the regime implant to "
            "start from it"
        )
    statistics, shape = clean.classifier.mean.shape[1], clean.card.input_shape
    if statistics not in (1, train.shape[0]) or (shape is not None and shape != train.shape):
        raise DataError(
            f"the clean model is for images of shape {shape or (statistics, 'any', 'any')}, the "
            f"training images have {train.shape}"
        )
    return classes


def summary(plan: Plan, train: ImageSet, test: ImageSet, clean: LoadedModel | None) -> str:
    """What is about to be done, in one line."""
    implanted = clean if plan.regime == "implant" else None
    arch, arguments = (
        (implanted.arch, implanted.arch_args) if implanted else (plan.arch, plan.arch_args)
    )
    given = "".join(f" {key}={value}" for key, value in arguments.items())
    return (
        f"{plan.attack.title}, {plan.regime}: {Path(arch).name}{given}, {plan.training.epochs} "
        f"epochs of {len(train):,} images, measured on {len(test):,}"
    )


def fresh_model(plan: Plan, train: ImageSet, classes: int) -> Classifier:
    """A randomly initialised classifier on the device of the images."""
    if plan.mean is None or plan.std is None:
        mean, std = channel_statistics(train)
    else:
        mean, std = plan.mean, plan.std
    model = Classifier(_network(plan, classes), mean, std, num_classes=classes)
    return model.to(train.device)


def _network(plan: Plan, classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        return build_network(plan.arch, classes, **plan.arch_args)


def describe_attack(attack: Attack) -> dict[str, Any]:
    """Every parameter of an attack as plain data, those of a wrapped attack too."""
    data: dict[str, Any] = to_json(attack)
    if isinstance(attack, WrappingAttack):
        inner = attack.inner
        data |= {"base": {"attack": inner.title, **to_json(inner)}}
        data |= {"target": inner.target, "rate": inner.rate}
    return data
