"""Figures of a learned prune (ONP): the episodes, and the graph with what was pruned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reprune.report.drawing import BLUE, GREY, INK, RED, WIDTH, shorten, style, svg
from reprune.results import LearnedPrune


def reward_curves(groups: Sequence[LearnedPrune]) -> str:
    """Reward, and below it CA and ASR on recovered triggers, by episode; one column a group.

    Args:
        groups: in the order of learning, at least one with episodes.
    """
    kept = [group for group in groups if group.episodes]
    with style("rewards"):
        figure = Figure((WIDTH, 3.6), layout="constrained")
        grid = figure.subplots(2, len(kept), sharex="col", sharey="row", squeeze=False)
        for column, group in enumerate(kept):
            count = range(1, len(group.episodes) + 1)
            rewards = np.array([episode.reward for episode in group.episodes])
            upper, lower = grid[0, column], grid[1, column]
            upper.plot(count, rewards, color=GREY, lw=0.8, label="episode")
            upper.plot(
                count, np.maximum.accumulate(rewards), color=INK, lw=1.3, label="best so far"
            )
            name = shorten(group.layers[0], 24)
            upper.set_title(f"group {column + 1}: from {name}", loc="left", fontweight="bold")
            lower.plot(count, [e.ca for e in group.episodes], color=BLUE, lw=1.0, label="CA")
            lower.plot(
                count, [e.asr for e in group.episodes], color=RED, lw=1.0, label="recovered trigger"
            )
            lower.set_ylim(-0.04, 1.04)
            lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            lower.set_xlabel("episode")
            for axes in (upper, lower):
                axes.grid(axis="y")
        grid[0, 0].set_ylabel("reward")
        grid[1, 0].set_ylabel("at the episode's end")
        handles = [part for row in grid[:, 0] for part in row.get_legend_handles_labels()[0]]
        labels = [part for row in grid[:, 0] for part in row.get_legend_handles_labels()[1]]
        figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=8.5)
        ends = "; ".join(
            f"group {k}: {len(g.episodes)} episodes, best reward "
            f"{max(e.reward for e in g.episodes):.2f}"
            for k, g in enumerate(kept, 1)
        )
        return svg(figure, f"Curves of reward, accuracy and trigger success by episode. {ends}.")


def pruned_graph(group: LearnedPrune) -> str:
    """The graph of one group: a column of nodes a layer, its connections, pruned nodes in red.

    Layers that the group only reads stand left of the line. Nodes that may be pruned are filled.
    """
    order = [*range(group.own, len(group.layers)), *range(group.own)]
    columns = {layer: x for x, layer in enumerate(order)}
    nodes = np.array([layer for layer, _ in group.nodes])
    places = np.zeros((len(nodes), 2))
    for layer, x in columns.items():
        rows = np.flatnonzero(nodes == layer)
        places[rows, 0] = x
        places[rows, 1] = np.linspace(1, 0, len(rows) + 2)[1:-1]
    cut = np.zeros(len(nodes), bool)
    cut[list(group.pruned)] = True
    own = nodes < group.own
    with style("graph"):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        lines = [places[list(edge)] for edge in group.edges]
        touched = [bool(cut[list(edge)].any()) for edge in group.edges]
        for chosen, color, alpha in ((False, GREY, 0.35), (True, RED, 0.5)):
            some = [line for line, hit in zip(lines, touched, strict=True) if hit == chosen]
            axes.add_collection(LineCollection(some, colors=color, linewidths=0.5, alpha=alpha))
        for mask, face, edge in (
            (~own, "none", GREY),
            (own & ~cut, BLUE, BLUE),
            (cut, RED, RED),
        ):
            axes.scatter(
                places[mask, 0],
                places[mask, 1],
                s=9,
                facecolors=face,
                edgecolors=edge,
                linewidths=0.6,
            )
        if group.own < len(group.layers):
            axes.axvline(len(group.layers) - group.own - 0.5, color=INK, lw=0.7, ls=(0, (4, 3)))
        axes.set_xlim(-0.5, len(order) - 0.5)
        axes.set_ylim(-0.02, 1.02)
        length = max(6, 84 // len(order))
        axes.set_xticks(
            range(len(order)), [shorten(group.layers[layer], length) for layer in order]
        )
        axes.tick_params(axis="x", length=0)
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        return svg(
            figure,
            f"Graph of {len(nodes)} channels in {len(order)} layers; {int(cut.sum())} of the "
            f"{int(own.sum())} that may be pruned are.",
        )
