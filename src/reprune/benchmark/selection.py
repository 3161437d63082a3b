"""Other prunes of a finished ranking: a fixed number, or the best by the attack itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch

from reprune.benchmark.settings import with_settings
from reprune.benchmark.spec import Experiment
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense, Purified
from reprune.defenses.pruning import PruningDefense
from reprune.errors import ConfigurationError
from reprune.masks import bake
from reprune.rnp import RNP, Order, Pruning
from reprune.sites import find_sites

ORACLE_DROP = 2.0
"""Points of test accuracy that the oracle may lose; the defenders' budget, too."""

ORACLE_STEPS = 14
"""Numbers of channels that the oracle tries: a geometric grid from 1 to all."""

Figures = Callable[[Classifier], dict[str, float]]
"""CA, ASR and RA of a model on test images, in percent."""


@dataclass(frozen=True)
class Selected:
    """A repaired model, its figures where they are known already, and how many channels went."""

    model: Classifier
    pruned: int
    after: dict[str, float] | None = None


def select(
    experiment: Experiment,
    defense: Defense,
    original: Classifier,
    purified: Purified,
    images: ImageSet,
    figures: Figures,
) -> Selected:
    """The repaired model of an experiment from one run of its method.

    `defender` is what the method returned. `fixed` prunes what the settings say. `oracle` looks at
    the attack: of `ORACLE_STEPS` numbers of channels, and the defender's, it takes the one with the
    lowest ASR whose test accuracy falls by at most `ORACLE_DROP` points, the smaller of two equals.

    Args:
        experiment: the selection, and settings of `pruning`.
        defense, original, purified: the method, what it got and what it returned.
        images: two or more images, for the places of the channels.
        figures: what the oracle looks at.

    Raises:
        ConfigurationError: a method that does not end with pruning, so that there is nothing to
            choose; fixed settings that ask for the dynamic rule.
    """
    chosen_by_defender = sum(len(mask.pruned) for mask in purified.trace.masks)
    if experiment.selection == "defender":
        return Selected(purified.model, chosen_by_defender)
    if not selectable(defense) or not purified.trace.masks:
        raise ConfigurationError(
            f"{experiment.method} does not end with pruning by a ranking, so there is no number of "
            f"channels to choose: the selection {experiment.selection!r} does not apply"
        )
    chosen = {k: v for k, v in experiment.settings.items() if k.startswith("pruning.")}
    if experiment.selection == "oracle":
        chosen = {"pruning.by": "count", "pruning.amount": 0}
    pruning = with_settings(defense, chosen, experiment.method).pruning
    if pruning.by == "dynamic":
        raise ConfigurationError(
            f"{experiment.label}: a fixed selection needs pruning.by and pruning.amount"
        )
    order = _order(defense, original, purified, images, pruning)
    if experiment.selection == "fixed":
        return _pruned(original, order, order.fixed)
    start = figures(original)
    best = Selected(original, 0, start)
    for count in sorted({*_grid(len(order)), chosen_by_defender} - {0}):
        tried = _pruned(original, order, count)
        after = figures(tried.model)
        if start["ca"] - after["ca"] > ORACLE_DROP:
            continue
        if best.after is None or after.get("asr", 0.0) < best.after.get("asr", 0.0):
            best = Selected(tried.model, count, after)
    return best


def selectable(defense: Defense) -> TypeGuard[RNP | PruningDefense]:
    """Whether a method ends with pruning by a ranking, so that other numbers can be pruned."""
    return isinstance(defense, RNP | PruningDefense) and defense.finetuning is None


def _order(
    defense: RNP | PruningDefense,
    original: Classifier,
    purified: Purified,
    images: ImageSet,
    pruning: Pruning,
) -> Order:
    sites = find_sites(
        original,
        images.pixels(slice(0, 2)),
        linear=defense.linear,
        layers=defense.layers,
    )
    masks = purified.trace.masks
    scores, values = (
        [torch.tensor(getattr(mask, name)) for mask in masks] for name in ("scores", "values")
    )
    return Order(sites, scores, pruning, values)


def _pruned(original: Classifier, order: Order, count: int) -> Selected:
    return Selected(bake(original, order.mask(count).to(original.device)), count)


def _grid(channels: int) -> list[int]:
    steps = {round(channels ** (i / (ORACLE_STEPS - 1))) for i in range(ORACLE_STEPS)}
    return sorted(steps)
