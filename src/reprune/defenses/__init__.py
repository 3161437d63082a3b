"""The methods that repair a model, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from reprune.defense import Defense
from reprune.defenses.abl import ABL
from reprune.defenses.anp import ANP
from reprune.defenses.auto import Auto, Effort
from reprune.defenses.clp import CLP
from reprune.defenses.fine_pruning import FinePruning
from reprune.defenses.finetuning import FineTune
from reprune.defenses.ibau import IBAU
from reprune.defenses.nad import NAD
from reprune.defenses.onp import ONP
from reprune.defenses.shapley import ShapleyPruning
from reprune.defenses.trigger_repair import TriggerRepair
from reprune.errors import ConfigurationError
from reprune.names import find
from reprune.rnp import RNP, Pruning, Unlearning

DEFENSES: dict[str, Callable[[], Defense]] = {
    "auto": Auto,
    "auto:low": partial(Auto.effort, "low"),
    "auto:high": partial(Auto.effort, "high"),
    "auto:late": Auto.late,
    "rnp": RNP,
    "rnp:paper": RNP.paper,
    "rnp:released": RNP.released,
    "ft": FineTune,
    "ft:paper": FineTune.paper,
    "ft-sam": FineTune.sharpness_aware,
    "ft-sam:paper": FineTune.sharpness_aware_paper,
    "fp": FinePruning,
    "fp:paper": FinePruning.paper,
    "nad": NAD,
    "nad:paper": NAD.paper,
    "ibau": IBAU,
    "ibau:paper": IBAU.paper,
    "anp": ANP,
    "anp:paper": ANP.paper,
    "clp": CLP,
    "clp:paper": CLP.paper,
    "shapley": ShapleyPruning,
    "shapley:paper": ShapleyPruning.paper,
    "onp": ONP,
    "onp:paper": ONP.paper,
    "nc+ft": TriggerRepair,
    "nc+ft:paper": TriggerRepair.paper,
    "nc+abl": partial(TriggerRepair, by="unlearn"),
    "nc+abl:paper": partial(TriggerRepair.paper, "unlearn"),
    "nu+nc+ft": partial(TriggerRepair, unlearning=Unlearning()),
    "nu+nc+ft:paper": partial(TriggerRepair.paper, unlearned=True),
    "nu+nc+abl": partial(TriggerRepair, by="unlearn", unlearning=Unlearning()),
    "nu+nc+abl:paper": partial(TriggerRepair.paper, "unlearn", unlearned=True),
    "nu+fp": FinePruning.on_unlearned,
    "nu+fp:paper": lambda: replace(FinePruning.paper(), unlearning=RNP.paper().unlearning),
}
"""Names of `reprune purify --method`; `NAME:paper` is the original paper's settings.

`auto:low` and `auto:high` are its efforts, `auto:late` what it was before it repelled triggers.
"""

TRAINING_DEFENSES: dict[str, Callable[[], ABL]] = {"abl": ABL, "abl:paper": ABL.paper}
"""Methods that train the model anew on its own, possibly poisoned, training data."""


def make_defense(
    name: str,
    *,
    max_accuracy_drop: float | None = None,
    effort: Effort | None = None,
    time_limit: float | None = None,
) -> Defense | ABL:
    """The method called `name`.

    Args:
        name: one of `DEFENSES` or `TRAINING_DEFENSES`.
        max_accuracy_drop: accuracy that the repair may cost, in [0, 1]; the method's own by
            default.
        effort: of the method `auto`; normal by default.
        time_limit: of the method `auto`, in seconds; none by default.

    Raises:
        UnknownNameError: no such method; the message lists the known ones.
        ConfigurationError: an accuracy drop for a method that is not bound by one, effort or time
            limit for another method than `auto`.
    """
    registry: dict[str, Callable[[], Defense | ABL]] = {**DEFENSES, **TRAINING_DEFENSES}
    defense = find(registry, name, kind="method")
    if isinstance(defense, Auto):
        if effort is not None and name != "auto":
            raise ConfigurationError(f"effort is for the method auto, not for {name}: leave it out")
        chosen = defense if effort is None else Auto.effort(effort)
        defense = replace(chosen, time_limit=time_limit)
    elif effort is not None or time_limit is not None:
        raise ConfigurationError(
            f"effort and time limit are for the method auto, not for {name}: leave them out"
        )
    if max_accuracy_drop is None:
        return defense
    if isinstance(defense, Auto):
        return replace(defense, max_accuracy_drop=max_accuracy_drop)
    pruning = _bound(defense)
    if pruning is None:
        raise ConfigurationError(
            f"the method {name} does not prune within an accuracy budget: leave out the accuracy "
            "drop"
        )
    budgeted = replace(pruning, max_accuracy_drop=max_accuracy_drop)
    return replace(defense, pruning=budgeted)  # type: ignore[type-var]


def accuracy_budget(defense: object) -> float | None:
    """The accuracy that the repair may cost, in [0, 1], where the method is bound by one."""
    if isinstance(defense, Auto):
        return defense.max_accuracy_drop
    pruning = _bound(defense)
    return pruning.max_accuracy_drop if pruning else None


def _bound(defense: object) -> Pruning | None:
    """How the method prunes, where it does so within an accuracy budget."""
    pruning = getattr(defense, "pruning", None)
    return pruning if isinstance(pruning, Pruning) and pruning.by == "dynamic" else None


__all__ = ["ABL", "DEFENSES", "TRAINING_DEFENSES", "Auto", "accuracy_budget", "make_defense"]
