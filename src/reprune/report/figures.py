"""Figures of a report as SVG text: a result in, `<svg ...>` out, the same text for the same result.

Each figure carries its own description for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from reprune.report.drawing import BLUE, GREY, INK, RED, WIDTH, shorten, style, svg
from reprune.report.report import Budget
from reprune.results import Epoch, PruningPoint, SiteMask

MOST_SITES = 40


def prediction_histogram(
    counts: Sequence[int], names: Sequence[str], label: int | None = None
) -> str:
    """Bars of how often each class is predicted, `label` in red.

    Args:
        counts: predictions per class, `(classes,)`.
        names: one name per class.
        label: the class to mark, or `None`.
    """
    total = sum(counts) or 1
    shares = [count / total for count in counts]
    top = max(range(len(counts)), key=counts.__getitem__)
    with style("predictions"):
        figure = Figure((WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        colors = [RED if k == label else GREY for k in range(len(counts))]
        axes.bar(range(len(counts)), shares, color=colors, width=0.75)
        axes.set_ylim(0, max(max(shares) * 1.08, 0.05))
        axes.set_xlim(-0.7, len(counts) - 0.3)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        axes.set_ylabel("share of predictions")
        step = -(-len(counts) // 50)
        shown = range(0, len(counts), step)
        flat = len(counts) <= 12
        axes.set_xticks(
            shown,
            [shorten(names[k], 11) if flat else f"{shorten(names[k])} {k}" for k in shown],
            rotation=0 if flat else 90,
            fontsize=8.5 if flat else 7,
        )
        axes.tick_params(axis="x", length=0)
        return svg(
            figure,
            f"Bar chart of predicted classes; the most frequent is {names[top]} with "
            f"{counts[top]} of {sum(counts)} predictions.",
        )


def mask_histograms(masks: Sequence[SiteMask]) -> str:
    """Small histograms of the recovered mask, one per site, pruned channels in red.

    Above `MOST_SITES` sites only those with the most pruned channels are drawn, in network order.
    """
    order = sorted(range(len(masks)), key=lambda i: -len(masks[i].pruned))[:MOST_SITES]
    shown = [masks[i] for i in sorted(order)]
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    edges = np.linspace(0, 1, 26)
    with style("masks"):
        figure = Figure((WIDTH, 0.5 + 1.15 * rows))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, mask in zip(grid.flat, shown, strict=False):
            values = np.clip(np.asarray(mask.values), 0, 1)
            cut = np.zeros(len(values), bool)
            cut[list(mask.pruned)] = True
            for chosen, color in ((~cut, GREY), (cut, RED)):
                counts, _ = np.histogram(values[chosen], edges)
                axes.stairs(counts, edges, fill=True, color=color, alpha=0.9)
            axes.set_title(shorten(mask.site or mask.layer, 26), loc="left", pad=3, fontsize=8)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(0, max(10, 1.3 * max(len(m.values) for m in shown)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.minorticks_off()
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_visible(False)
        for column in range(columns):
            used = [r for r in range(rows) if r * columns + column < len(shown)]
            grid[used[-1], column].tick_params(labelbottom=True)
        height = 0.5 + 1.15 * rows
        figure.subplots_adjust(0.06, 0.42 / height, 0.995, 1 - 0.22 / height, 0.12, 0.42)
        figure.supxlabel("mask value of a channel", y=0.05 / height, va="bottom", fontsize=8.5)
        figure.supylabel("channels (log scale)", x=0.002, fontsize=8.5)
        pruned = sum(len(mask.pruned) for mask in masks)
        return svg(
            figure,
            f"Histograms of mask values for {len(shown)} of {len(masks)} layers; "
            f"{pruned} channels are pruned.",
        )


def pruning_curve(
    curve: Sequence[PruningPoint], chosen: int | None = None, budget: Budget | None = None
) -> str:
    """Accuracy and disagreement over the number of pruned channels, the choice marked.

    Args:
        curve: the judged prunes by rising channel count, at least one.
        chosen: index of the one taken, or `None`.
        budget: drawn as a dashed line where given.
    """
    channels = [point.channels for point in curve]
    positive = [count for count in channels if count > 0]
    original = curve[0].accuracy + curve[0].drop
    panels: tuple[tuple[str, list[float], float | None], ...] = (
        (
            "accuracy",
            [p.accuracy for p in curve],
            original - budget.limit if budget and budget.measure == "drop" else None,
        ),
        (
            "changed predictions",
            [p.disagreement for p in curve],
            budget.limit if budget and budget.measure == "disagreement" else None,
        ),
    )
    with style("curve"):
        figure = Figure((WIDTH, 3.9), layout="constrained")
        grid = figure.subplots(2, 1, sharex=True)
        for axes, (name, values, line) in zip(grid, panels, strict=True):
            axes.plot(channels, values, color=BLUE, lw=1.3, marker="o", ms=3, label="candidate")
            if line is not None:
                axes.axhline(line, color=INK, lw=0.9, ls=(0, (4, 3)), label="budget")
            if chosen is not None and 0 <= chosen < len(curve):
                axes.plot(
                    channels[chosen],
                    values[chosen],
                    "o",
                    ms=8,
                    mfc="none",
                    mec=RED,
                    mew=1.6,
                    ls="none",
                    label="chosen",
                )
                axes.axvline(channels[chosen], color=RED, lw=0.7, alpha=0.5)
            axes.set_ylabel(name)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=2))
            axes.margins(y=0.12)
            axes.grid(axis="y")
        logarithmic = bool(positive) and max(positive) > 30 * min(positive)
        if logarithmic:
            grid[1].set_xscale("symlog", linthresh=min(positive))
            steps = [0, *(m * 10**k for k in range(9) for m in (1, 2, 5))]
            grid[1].set_xticks([s for s in steps if s == 0 or min(positive) <= s <= max(positive)])
            grid[1].minorticks_off()
            grid[1].set_xlim(-0.2 * min(positive), 1.15 * max(positive))
        grid[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        grid[1].set_xlabel("channels pruned (log scale)" if logarithmic else "channels pruned")
        with_line = 1 if panels[1][2] is not None else 0
        handles, labels = grid[with_line].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8.5)
        taken = (
            f"{channels[chosen]} channels are pruned" if chosen is not None else "none is marked"
        )
        return svg(
            figure,
            "Curves of accuracy and of changed predictions over the number of pruned channels, "
            f"{channels[0]} to {channels[-1]}; {taken}.",
        )


def phase_curves(phases: Mapping[str, Sequence[Epoch]]) -> str:
    """Accuracy and loss by epoch, one column per phase; phases without epochs are left out.

    Args:
        phases: epochs by the phase's name, at least one of them not empty.
    """
    kept = {name: epochs for name, epochs in phases.items() if epochs}
    with style("phases"):
        figure = Figure((WIDTH, 3.4), layout="constrained")
        grid = figure.subplots(2, len(kept), sharex="col", squeeze=False)
        for column, (name, epochs) in enumerate(kept.items()):
            steps = [epoch.epoch for epoch in epochs]
            losses = [e.loss if math.isfinite(e.loss) else math.nan for e in epochs]
            upper, lower = grid[0, column], grid[1, column]
            upper.plot(steps, [e.accuracy for e in epochs], color=BLUE, lw=1.3, marker="o", ms=3)
            upper.set_ylim(-0.04, 1.04)
            upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            upper.set_title(name, loc="left", fontweight="bold")
            lower.plot(steps, losses, color=INK, lw=1.3, marker="o", ms=3)
            lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            lower.set_xlabel("epoch")
            for axes in (upper, lower):
                axes.grid(axis="y")
                axes.margins(x=0.04, y=0.12)
        grid[0, 0].set_ylabel("training accuracy")
        grid[1, 0].set_ylabel("loss")
        figure.align_ylabels()
        ends = "; ".join(
            f"{name} from {epochs[0].accuracy:.0%} to {epochs[-1].accuracy:.0%}"
            for name, epochs in kept.items()
        )
        return svg(figure, f"Curves of training accuracy and loss by epoch: accuracy in {ends}.")


def feature_maps(
    stages: Mapping[str, Mapping[str, Any]], image: Any | None = None, *, index: int = 0
) -> str:
    """A grid of maps of one image: a row per stage of the model, a column per layer.

    Args:
        stages: by the stage's name, maps `(n, h, w)` by layer; the same layers in each.
        image: the image itself, uint8 `(c, h, w)`, drawn in front of the first row.
        index: which of the n images the maps are drawn for.
    """
    layers = list(dict.fromkeys(layer for maps in stages.values() for layer in maps))
    first = 0 if image is None else 1
    columns = len(layers) + first
    size = min(1.3, (WIDTH - 1.0) / columns)
    with style(f"features {index}"):
        figure = Figure((1.0 + columns * size, 0.25 + len(stages) * size))
        grid = figure.subplots(len(stages), columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        if image is not None:
            _show(grid[0, 0], np.asarray(image), "image")
        for row, (stage, maps) in enumerate(stages.items()):
            for column, layer in enumerate(layers):
                if layer in maps:
                    title = layer if row == 0 else ""
                    _show(grid[row, first + column], np.asarray(maps[layer][index]), title)
            height = 1 - (row + 0.5 + 0.25 / size) / (len(stages) + 0.25 / size)
            figure.text(0.0, height, shorten(stage, 16), va="center", fontsize=8.5)
        width, height = figure.get_size_inches()
        figure.subplots_adjust(0.95 / width, 0.0, 1.0, 1 - 0.25 / height, 0.06, 0.06)
        return svg(
            figure,
            f"Feature maps of layers {', '.join(layers)} for the models {', '.join(stages)}.",
        )


def _show(axes: Any, picture: np.ndarray[Any, Any], title: str) -> None:
    if picture.ndim == 3:
        picture = picture.transpose(1, 2, 0)
        picture = picture[..., 0] if picture.shape[2] == 1 else picture[..., :3]
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
    else:
        axes.imshow(picture, cmap="viridis", interpolation="none")
    axes.set_title(shorten(title, 22), fontsize=8, pad=3)
