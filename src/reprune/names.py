"""Registries: what a name on the command line stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from reprune.errors import UnknownNameError

T = TypeVar("T")


def find(registry: Mapping[str, Callable[[], T]], name: str, *, kind: str) -> T:
    """What `name` stands for, made anew.

    Raises:
        UnknownNameError: no such name; the message lists the known ones and the likely ones.
    """
    if name in registry:
        return registry[name]()
    near = get_close_matches(name, registry, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UnknownNameError(f"unknown {kind} {name!r}; known {kind}s: {', '.join(registry)}{hint}")
