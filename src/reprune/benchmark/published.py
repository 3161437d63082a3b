"""The papers' numbers, as they were printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

VALUES = ("ca", "asr", "channels", "detected", "ca_drop_below")
"""Keys of a published row that are measured values; all others but `note` say what was measured."""


@cache
def published(name: str) -> tuple[dict[str, Any], ...]:
    """The rows of a paper's table; none where it printed no numbers.

    `published/README.md` says what the keys are.
    """
    file = files("reprune.benchmark") / "published" / f"{name}.jsonl"
    if not file.is_file():
        return ()
    return tuple(json.loads(line) for line in file.read_text("utf-8").splitlines())


def printed(name: str, where: Mapping[str, Any]) -> dict[str, float]:
    """The values that a paper's table prints for the row with these keys; empty for none.

    Example:
        >>> printed("table2", {"data": "cifar10", "attack": "badnets", "method": "rnp"})
        {'asr': 0.2, 'ca': 92.22}
    """
    for row in published(name):
        aside = (*VALUES, "note") if "arch" in where else (*VALUES, "note", "arch")
        if {k: v for k, v in row.items() if k not in aside} == where:
            return {key: row[key] for key in VALUES if key in row}
    return {}
