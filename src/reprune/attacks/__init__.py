"""The attacks: triggers, poisoning recipes, and what is learned together with a classifier."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from reprune.attacks.adaptive_blend import AdaptiveBlend
from reprune.attacks.adaptive_distillation import AdaptD
from reprune.attacks.adversarial_training import AdvT
from reprune.attacks.attack import Attack, Backdoored, Setup, TargetedAttack
from reprune.attacks.awp import AWP
from reprune.attacks.badnets import BadNets
from reprune.attacks.blend import Blend
from reprune.attacks.clean import Clean
from reprune.attacks.dfst import DFST
from reprune.attacks.dynamic import Dynamic
from reprune.attacks.feature_collision import FeatureCollision
from reprune.attacks.goal import Goal, triggered
from reprune.attacks.label_consistent import LabelConsistent
from reprune.attacks.lira import LIRA
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, poison
from reprune.attacks.sig import SIG
from reprune.attacks.trigger import LearnedTrigger, Stamp
from reprune.attacks.trigger_files import read_trigger, trigger_name, write_trigger
from reprune.attacks.trojan import Trojan
from reprune.attacks.wanet import WaNet
from reprune.errors import ConfigurationError, UnknownNameError

ATTACKS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "trojan": Trojan,
    "blend": Blend,
    "sig": SIG,
    "cl": LabelConsistent,
    "dynamic": Dynamic,
    "wanet": WaNet,
    "fc": FeatureCollision,
    "dfst": DFST,
    "awp": AWP,
    "lira": LIRA,
    "a-blend": AdaptiveBlend,
    "adapt-d": AdaptD,
    "adv-t": AdvT,
    "clean": Clean,
}
"""Attacks by the name that the command line uses."""


def find_attack(name: str) -> type[Attack]:
    """The attack of a name.

    Raises:
        UnknownNameError: no such attack; the message lists the known ones.
    """
    if name in ATTACKS:
        return ATTACKS[name]
    close = difflib.get_close_matches(name, ATTACKS, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownNameError(f"unknown attack {name!r}{hint}; known are {', '.join(ATTACKS)}")


def _plain(value: Any) -> Any:
    """Text that stands for nothing (`none`) or for a fraction (`16/255`) as that."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    above, slash, below = value.partition("/")
    try:
        return float(above) / float(below) if slash else value
    except (ValueError, ZeroDivisionError):
        return value


def make_attack(name: str, **parameters: Any) -> Attack:
    """The attack of a name with these parameters, as text or as values; others keep the paper's.

    Text may be `none` or a fraction, `16/255`. `base.KEY` is a parameter of a wrapped attack.

    Raises:
        UnknownNameError: no such attack.
        ConfigurationError: a parameter that the attack does not have, or of the wrong type.
    """
    attack = find_attack(name)
    inner = {
        key.removeprefix("base."): value
        for key, value in parameters.items()
        if key.startswith("base.")
    }
    parameters = {key: value for key, value in parameters.items() if not key.startswith("base.")}
    if inner and "base" in attack.__dataclass_fields__:
        base = parameters.get("base", attack.__dataclass_fields__["base"].default)
        parameters["base"] = make_attack(str(base), **inner)
    kinds = get_type_hints(attack)
    known = {field.name: kinds[field.name] for field in fields(attack)}
    unknown = sorted(parameters.keys() - known.keys())
    if unknown:
        raise ConfigurationError(
            f"{name} has no parameter {', '.join(unknown)}; "
            + (f"it has {', '.join(known)}" if known else "it has none")
        )
    values = {}
    for key, value in parameters.items():
        try:
            values[key] = TypeAdapter(known[key]).validate_python(_plain(value))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise ConfigurationError(f"{name}: {key} = {value!r}: {problem}") from error
    return attack(**values)


__all__ = [
    "ATTACKS",
    "AWP",
    "DFST",
    "LIRA",
    "SIG",
    "AdaptD",
    "AdaptiveBlend",
    "AdvT",
    "Attack",
    "Backdoored",
    "BadNets",
    "Blend",
    "Clean",
    "Dynamic",
    "FeatureCollision",
    "Goal",
    "LabelConsistent",
    "LearnedTrigger",
    "Poisoned",
    "PoisoningAttack",
    "Setup",
    "Stamp",
    "TargetedAttack",
    "Trojan",
    "WaNet",
    "find_attack",
    "make_attack",
    "poison",
    "read_trigger",
    "trigger_name",
    "triggered",
    "write_trigger",
]
