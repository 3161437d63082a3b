"""What the usual scan says of models without a backdoor: how strong their signs are."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from reprune.metrics import wilson_interval


@cache
def clean_strengths() -> tuple[float, ...]:
    """The strength of each clean model that no bound of the scan was set with, in rising order.

    At least 0; the largest one of models that were scanned several times, with the usual settings
    and 500 images in bfloat16.

    Source: this project's benchmark; `docs/auto-results.md` names the models.
    """
    text = files("reprune.detection").joinpath("calibration.json").read_text("utf-8")
    return tuple(json.loads(text)["clean"])


def among_clean(strength: float) -> str:
    """How many clean models had a sign as strong, with a 95 % Wilson interval, in words."""
    known = clean_strengths()
    count = sum(other >= strength for other in known)
    low, high = wilson_interval(count, len(known))
    return (
        f"{count} of {len(known)} small models without a backdoor showed a sign as strong as this "
        f"({strength:.2f}; 95 % interval of their share {low:.0%} to {high:.0%})"
    )
