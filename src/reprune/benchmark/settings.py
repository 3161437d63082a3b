"""Settings of a method by dotted name: `pruning.by`, `unlearning.epochs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from reprune.errors import ConfigurationError

T = TypeVar("T")


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
