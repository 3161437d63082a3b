"""The libraries that only the benchmark needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from reprune.errors import MissingDependencyError

EXTRAS = {"duckdb": "bench", "filelock": "bench", "pebble": "bench", "scipy": "bench", "ray": "ray"}
"""The install extra by the library."""


def needed(library: str) -> Any:
    """The module of an optional library, or of a part of it (`scipy.stats`).

    Raises:
        MissingDependencyError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(library)
    except ImportError as error:
        extra = EXTRAS[library.partition(".")[0]]
        raise MissingDependencyError(
            f"the benchmark needs {library}: pip install 'reprune[{extra}]'"
        ) from error
