"""Shapley values of a game whose players are removed one after the other, by sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from reprune.errors import ConfigurationError
from reprune.types import Progress, silent

Value = Callable[[Tensor], tuple[float, ...]]
"""What the players kept, `(players,)` of 0 and 1, are worth, in one or several figures."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the estimate.

    Attributes:
        evaluations: coalitions that may be valued, the full one not counted.
        per_order: of these, for one order of the players at most, so that it may end before the
            players do; orders are drawn while as many are left.
        resolution: a run of players between two valued coalitions is not looked into where all
            figures change by less; its change is shared evenly. 0 looks into every run.
        discard: an order ends once the first figure is at most this share of the full one's, in
            [0, 1]; the players left count as contributing nothing. `None`: never.
        epsilon: probability that the next player of an order is drawn at random and not by the
            estimate so far, in [0, 1]; 1, with `resolution=0`, `discard=None` and `per_order` as
            many as there are players, gives the unbiased estimate.
    """

    evaluations: int = 400
    per_order: int = 25
    resolution: float = 0.05
    discard: float | None = 0.05
    epsilon: float = 0.3

    def check(self) -> None:
        """Raises ConfigurationError for settings that cannot work."""
        if self.per_order < 1 or self.evaluations < self.per_order:
            raise ConfigurationError(
                "sampling needs 1 <= per_order <= evaluations, got per_order "
                f"{self.per_order} and evaluations {self.evaluations}"
            )
        if not self.resolution >= 0:
            raise ConfigurationError(f"resolution must be at least 0, got {self.resolution}")
        if self.discard is not None and not 0 <= self.discard <= 1:
            raise ConfigurationError(f"discard must lie in [0, 1], got {self.discard}")
        if not 0 <= self.epsilon <= 1:
            raise ConfigurationError(f"epsilon must lie in [0, 1], got {self.epsilon}")


def shapley_values(
    value: Value,
    players: int,
    settings: Sampling,
    *,
    weights: tuple[float, ...] = (1.0,),
    generator: torch.Generator,
    progress: Progress = silent,
) -> Tensor:
    r"""Monte-Carlo estimate of the players' Shapley values, one column a figure.

    $$\phi_k = \frac{1}{n!} \sum_{\pi} v(P_\pi^k \cup \{k\}) - v(P_\pi^k)$$

    where $P_\pi^k$ are the players that remain when k's turn to leave comes in order $\pi$. Each
    sampled order is walked from the full coalition in doubling steps until the first figure is
    discarded; then the run of players over which the figures change most is halved, again and
    again, while evaluations are left. With one evaluation a player, `resolution` 0 and no
    `discard`, an order's contributions are exact and add up to v(all) - v(none).

    Args:
        value: the game.
        players: how many, n.
        settings: how much is sampled.
        weights: how the figures count together where the estimate so far draws the next player.
        generator: draws the orders.
        progress: told "shapley" after each evaluation.

    Returns:
        `(players, figures)`, float64 on the CPU.

    Source: Guan et al., CVPR 2022 (orders by Monte Carlo, discarding threshold, epsilon-greedy).
    Halving instead of removing every single player is a choice of this package: large networks have
    more channels than a walk can afford evaluations.

    Raises:
        ConfigurationError: settings that cannot work.
    """
    settings.check()
    full = value(torch.ones(players))
    total, orders, spent = torch.zeros(players, len(full), dtype=torch.float64), 0, 0
    factors = torch.tensor(weights, dtype=torch.float64)

    def counted(keep: Tensor) -> tuple[float, ...]:
        nonlocal spent
        figures = value(keep)
        spent += 1
        progress("shapley", spent, settings.evaluations)
        return figures

    while settings.evaluations - spent >= settings.per_order:
        order = _draw(total @ factors, settings.epsilon, generator)
        total += _walk(counted, order, full, settings)
        orders += 1
    return total / orders


def _draw(estimate: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """An order: each next player at random or, if any is positive, the best by `estimate`."""
    players = len(estimate)
    random = torch.randperm(players, generator=generator)
    explore = (torch.rand(players, generator=generator) < epsilon).tolist()
    ranked = random[estimate[random].argsort(descending=True, stable=True)]
    greedy = iter(ranked[estimate[ranked] > 0].tolist())
    fallback = iter(random.tolist())
    taken: dict[int, None] = {}
    for exploring in explore:
        free = None if exploring else next((k for k in greedy if k not in taken), None)
        if free is None:
            free = next(k for k in fallback if k not in taken)
        taken[free] = None
    return torch.tensor(list(taken))


def _walk(value: Value, order: Tensor, full: tuple[float, ...], settings: Sampling) -> Tensor:
    """The contributions of all players along one order, `(players, figures)`."""
    players = len(order)
    known = {0: torch.tensor(full, dtype=torch.float64)}

    def look(removed: int) -> Tensor:
        keep = torch.ones(players)
        keep[order[:removed]] = 0
        known[removed] = torch.tensor(value(keep), dtype=torch.float64)
        return known[removed]

    floor = -math.inf if settings.discard is None else settings.discard * full[0]
    end, first = 0, math.inf
    while end < players and first > floor and len(known) <= settings.per_order:
        end = min(max(1, 2 * end), players)
        first = float(look(end)[0])
    changes = {run: _change(known, run) for run in pairwise(sorted(known))}
    while len(known) <= settings.per_order:
        wide = {
            (start, stop): change
            for (start, stop), change in changes.items()
            if stop - start > 1 and change >= settings.resolution
        }
        if not wide:
            break
        start, stop = max(wide, key=lambda run: (wide[run], -run[0]))
        middle = (start + stop) // 2
        look(middle)
        del changes[start, stop]
        for run in ((start, middle), (middle, stop)):
            changes[run] = _change(known, run)
    contributions = torch.zeros(players, len(full), dtype=torch.float64)
    for start, stop in changes:
        contributions[order[start:stop]] = (known[start] - known[stop]) / (stop - start)
    return contributions


def _change(known: dict[int, Tensor], run: tuple[int, int]) -> float:
    """The largest change of a figure over a run of players."""
    return float((known[run[0]] - known[run[1]]).abs().max())
