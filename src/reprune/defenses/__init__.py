"""The methods that repair a model, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from reprune.defense import Defense
from reprune.errors import ConfigurationError
from reprune.names import find
from reprune.rnp import RNP, Pruning

DEFENSES: dict[str, Callable[[], Defense]] = {
    "rnp": RNP,
    "rnp:paper": RNP.paper,
    "rnp:released": RNP.released,
}
"""Names of `reprune purify --method`; `NAME:paper` is the original paper's settings."""


def make_defense(name: str, *, max_accuracy_drop: float | None = None) -> Defense:
    """The method called `name`.

    Args:
        name: one of `DEFENSES`.
        max_accuracy_drop: accuracy that pruning may cost, in [0, 1]; the method's own by default.

    Raises:
        UnknownNameError: no such method; the message lists the known ones.
        ConfigurationError: an accuracy drop for a method that does not prune by one.
    """
    defense = find(DEFENSES, name, kind="method")
    if max_accuracy_drop is None:
        return defense
    pruning = accuracy_budget(defense)
    if pruning is None:
        raise ConfigurationError(
            f"the method {name} does not prune within an accuracy budget: leave out the accuracy "
            "drop"
        )
    budgeted = replace(pruning, max_accuracy_drop=max_accuracy_drop)
    return replace(defense, pruning=budgeted)  # type: ignore[type-var]


def accuracy_budget(defense: Defense) -> Pruning | None:
    """How `defense` limits pruning, if it does so by an accuracy drop."""
    pruning = getattr(defense, "pruning", None)
    return pruning if isinstance(pruning, Pruning) and pruning.by == "dynamic" else None
