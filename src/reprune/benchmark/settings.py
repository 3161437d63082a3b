"""Settings of a method by dotted name, `pruning.by`, `unlearning.epochs`; methods with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from reprune.attacks import Attack, make_attack
from reprune.benchmark.spec import NONE, Experiment, ModelSpec, Task, hashed
from reprune.defenses import make_defense
from reprune.defenses.auto import LATE
from reprune.detection import make_detector
from reprune.detection.filters import make_filter
from reprune.errors import ConfigurationError, RepruneError
from reprune.report import describe
from reprune.training import Training

T = TypeVar("T")

MAKERS: dict[Task, Callable[[str], Any]] = {
    "removal": make_defense,
    "detection": make_detector,
    "filtering": make_filter,
}
"""Where the methods of a task are from."""


def configured(experiment: Experiment) -> Any:
    """The method of an experiment with its settings.

    Raises:
        RepruneError: a method that is not there, or settings as in `with_settings`.
    """
    method = MAKERS[experiment.task](experiment.method)
    return with_settings(method, experiment.settings, experiment.method)


def beginning(experiment: Experiment) -> Experiment:
    """The experiment whose run begins like this one's: without what only the end depends on.

    `auto` and its relatives begin alike where they scan alike, whatever they are called. Other
    methods, and settings that cannot work, share nothing.
    """
    run = experiment.run
    if run.method.partition(":")[0] != "auto":
        return run
    try:
        said = describe(configured(run))
    except RepruneError:
        return run
    kept = {name: value for name, value in said.items() if name.partition(".")[0] not in LATE}
    return replace(run, method="auto", settings=kept)


def settings_digest(experiment: Experiment) -> str | None:
    """16 hexadecimal digits that name all settings of the method, the ones it has by default too.

    Another version may have other defaults; its records are those of other experiments. `None`
    where there is no method or no such method.
    """
    if experiment.method == NONE:
        return None
    try:
        return hashed(describe(configured(experiment)))
    except RepruneError:
        return None


def attack_of(spec: ModelSpec) -> Attack:
    """The attack that makes a trained model."""
    return make_attack(spec.attack, **spec.parameters)


def training_of(spec: ModelSpec) -> Training:
    """The training of a trained model."""
    return with_settings(Training(), spec.training, "training")


def model_digest(spec: ModelSpec) -> str | None:
    """16 hexadecimal digits that name how a model is made, by defaults, too.

    As of `settings_digest`. `None` for a given model, whose weights are in its spec, or of an
    attack that there is not.
    """
    if spec.source is not None:
        return None
    try:
        made = [describe(attack_of(spec)), describe(training_of(spec))]
    except RepruneError:
        return None
    start = model_digest(spec.start) if spec.start is not None else None
    return hashed([*made, start])


def with_settings(method: T, settings: Mapping[str, Any], name: str = "the method") -> T:
    """A copy of a frozen dataclass with other values, validated against its type hints.

    A dotted name reaches into settings that are dataclasses themselves. The value of such a
    setting as a whole is `None` where it may be, or a mapping of its fields.

    Args:
        method: any frozen dataclass.
        settings: values by name.
        name: what errors call it.

    Raises:
        ConfigurationError: a setting that is not there, or a value of the wrong type.

    Example:
        >>> from reprune import RNP
        >>> with_settings(RNP(), {"pruning.by": "count", "pruning.amount": 12}).pruning.amount
        12.0
    """
    for key, value in settings.items():
        method = _set(method, key.split("."), value, f"{name}: {key}")
    return method


def _set(thing: Any, path: list[str], value: Any, said: str) -> Any:
    if not is_dataclass(thing) or isinstance(thing, type):
        raise ConfigurationError(f"{said}: there is nothing to set, the part is {thing!r}")
    known = [field.name for field in fields(thing)]
    head, *rest = path
    if head not in known:
        raise ConfigurationError(f"{said}: no setting {head!r}; there are {', '.join(known)}")
    if rest:
        return replace(thing, **{head: _set(getattr(thing, head), rest, value, said)})
    kind = get_type_hints(type(thing))[head]
    try:
        checked = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigurationError(f"{said} = {value!r}: {error.errors()[0]['msg']}") from error
    return replace(thing, **{head: checked})
