"""What the usual scan says of models without a backdoor: how strong their signs are."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from reprune.metrics import wilson_interval


@cache
def clean_strengths() -> tuple[float, ...]:
    """The strength of each clean model that no bound of the scan was set with, in rising order.

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
        f"a sign as strong as this ({strength:.2f}) was seen in {count} of {len(known)} models "
        f"without a backdoor: a false-alarm rate of {low:.0%} to {high:.0%} (95 % interval)"
    )
