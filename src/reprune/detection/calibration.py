"""What the usual scan says of models without a backdoor: how strong their signs are."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from reprune.metrics import wilson_interval


@cache
def clean_strengths() -> tuple[float, ...]:
    """The strength of each clean model that was scanned for `docs/auto-results.md`, rising.

    At least 0; the largest one of models that were scanned several times, with the usual settings
    and 500 images in bfloat16.

    Source: this project's benchmark.
    """
    return tuple(_known()["clean"])


def among_clean(strength: float) -> str:
    """How many clean models had a sign as strong, with a 95 % Wilson interval, in words."""
    known, apart = clean_strengths(), _known()["set aside"]
    count = sum(other >= strength for other in known)
    low, high = wilson_interval(count, len(known))
    return (
        f"{count} of {len(known)} small models without a backdoor showed a sign as strong as this "
        f"({strength:.2f}; 95 % interval of their share {low:.0%} to {high:.0%}; {apart} of the "
        "models were not in view when the bounds were set)"
    )


def _known() -> dict[str, Any]:
    text = files("reprune.detection").joinpath("calibration.json").read_text("utf-8")
    known: dict[str, Any] = json.loads(text)
    return known
