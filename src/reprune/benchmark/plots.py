"""Plots of records, laid out as the RNP paper lays out its figures.

Rates are in percent. A mean is drawn with a bar from the smallest to the largest run; what has no
record is not drawn, and a line at the bottom says how many experiments are missing. The label of a
figure (`get_label`) describes it for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from reprune.attacks import find_attack
from reprune.benchmark.measured import Spread
from reprune.benchmark.plotting import (
    BLUE,
    COLOURS,
    GREEN,
    MARKERS,
    METHODS,
    ORANGE,
    PANEL,
    RANGE,
    WIDTH,
    Found,
    NothingToDrawError,
    Records,
    bars,
    described,
    find,
    reach,
)
from reprune.benchmark.profiles import Profile
from reprune.benchmark.spec import NONE
from reprune.benchmark.table import Row
from reprune.report.drawing import GREY, INK, style

PARTS = {"clean": BLUE, "triggered": ORANGE}


def figure3(records: Records, profile: str | Profile = "small") -> Figure:
    """ASR and CA over the share of clean images, one line an attack, one column a method.

    Raises:
        NothingToDrawError: no record.
    """
    found = find("figure3", records, profile)
    with style("figure3"):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        grid = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, (method, said) in enumerate(METHODS.items()):
            grid[0, column].set_title(said, **PANEL)
            for axes, value in zip(grid[:, column], ("asr", "ca"), strict=True):
                _curves(axes, found, method, "share", value)
        for axes in grid[1]:
            axes.set_xticks(axes.get_xticks(), [f"{100 * share:g}" for share in found.by("share")])
            axes.set_xlabel("clean images (% of the training set)")
        for axes, label in zip(grid[:, 0], ("ASR (%)", "CA (%)"), strict=True):
            axes.set_ylabel(label)
        return _finished(figure, found)


def figure4(records: Records, profile: str | Profile = "small") -> Figure:
    """ASR and CA over the epochs of unlearning, one line an attack.

    Raises:
        NothingToDrawError: no record.
    """
    found = find("figure4", records, profile)
    with style("figure4"):
        figure = Figure((WIDTH, 2.6), layout="constrained")
        for axes, value in zip(figure.subplots(1, 2), ("asr", "ca"), strict=True):
            _curves(axes, found, "rnp", "epochs", value)
            axes.set_xlabel("epochs of unlearning")
            axes.set_ylabel(f"{value.upper()} (%)")
        return _finished(figure, found)


def figure5(records: Records, profile: str | Profile = "small") -> Figure:
    """Bars of ASR and CA for unlearning and recovering neurons (N) or filters (F).

    Raises:
        NothingToDrawError: no record.
    """
    found = find("figure5", records, profile)
    names = ["no defence" if name == NONE else name for name in found.by("method")]
    with style("figure5"):
        figure = Figure((WIDTH / 2, 2.4), layout="constrained")
        axes = figure.subplots()
        for value, colour, shift in (("asr", ORANGE, -0.2), ("ca", BLUE, 0.2)):
            spreads = [line.cells[0].values.get(value) for line in found.lines]
            bars(axes, spreads, shift, colour, value.upper(), "%.0f")
        axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 106)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("%")
        figure.legend(loc="outside upper center", ncols=2)
        return described(figure, found.table.title, found.note)


def figure8(records: Records, profile: str | Profile = "small") -> Figure:
    """Entropies of clean and triggered images under STRIP, and the difference of their means.

    Histograms of each attack's first run by STRIP on the model and on the unlearned model; below,
    how far the mean entropy of clean images, in bits, lies above that of triggered ones.

    Raises:
        NothingToDrawError: no record.
    """
    said = "histograms of the first run; bars: mean and range over the runs"
    found = find("figure8", records, profile, said)
    runs = {
        attack: {line.row.where["method"]: _entropies(line.row, records) for line in group}
        for attack, group in found.by("attack").items()
    }
    runs = {attack: methods for attack, methods in runs.items() if any(methods.values())}
    if not runs:
        raise NothingToDrawError(
            "nothing to draw: no record of figure8 holds the entropies of triggered images; "
            "reprune bench run figure8"
        )
    columns, methods = 5, {"strip": "STRIP", "nu+strip": "NU+STRIP"}
    blocks = -(-len(runs) // columns)
    with style("figure8"):
        figure = Figure((WIDTH, 1.9 * blocks + 2.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.9 * blocks + 0.5, 2.1))
        upper, lower = parts
        grid = upper.subplots(2 * blocks, columns, sharex=True, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for place, (attack, own) in enumerate(runs.items()):
            top, column = 2 * (place // columns), place % columns
            for axes, (method, name) in zip(
                grid[top : top + 2, column], methods.items(), strict=True
            ):
                axes.set_axis_on()
                _histogram(axes, own[method])
                axes.set_ylabel(name if column == 0 else "")
            grid[top, column].set_title(find_attack(attack).title, **PANEL)
            if place >= len(runs) - columns:
                grid[top + 1, column].tick_params(labelbottom=True)
        upper.supxlabel("entropy (bits)", fontsize=8.5)
        patches = [
            Patch(color=colour, alpha=0.55, lw=0, label=name) for name, colour in PARTS.items()
        ]
        upper.legend(handles=patches, loc="outside upper center", ncols=2)
        axes = lower.subplots()
        looks = zip(methods.items(), (GREY, GREEN), (-0.2, 0.2), strict=True)
        for (method, name), colour, shift in looks:
            bars(axes, [_gap(own[method]) for own in runs.values()], shift, colour, name)
        axes.axhline(0, color=INK, lw=0.7)
        axes.set_xticks(range(len(runs)), [find_attack(attack).title for attack in runs])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("clean − triggered\n(mean entropy, bits)")
        axes.legend(ncols=2)
        return described(figure, found.table.title, found.note, lower)


def _finished(figure: Figure, found: Found) -> Figure:
    """With the attacks' legend and the note."""
    axes: Any = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        [handle[0] for handle in handles], labels, loc="outside upper center", ncols=len(labels)
    )
    return described(figure, found.table.title, found.note)


def _curves(axes: Any, found: Found, method: str, key: str, value: str) -> None:
    """One line an attack over the places of the values of `key`, side by side where they meet."""
    places = {one: place for place, one in enumerate(found.by(key))}
    groups = found.by("attack")
    for number, (attack, group) in enumerate(groups.items()):
        own = [line for line in group if line.row.where["method"] == method]
        spreads = [line.cells[0].values.get(value) for line in own]
        shift = 0.08 * (number - (len(groups) - 1) / 2)
        axes.errorbar(
            [places[line.row.where[key]] + shift for line in own],
            [math.nan if spread is None else spread.mean for spread in spreads],
            yerr=reach(spreads),
            label=find_attack(attack).title,
            color=COLOURS[number],
            marker=MARKERS[number],
            ms=3.6,
            lw=1.1,
            **RANGE,
        )
    axes.set_xticks(list(places.values()), [str(one) for one in places])
    axes.grid(axis="y")
    axes.set_xlim(-0.4, len(places) - 0.6)
    if value == "asr":
        axes.set_ylim(-4, 104)


def _entropies(row: Row, records: Records) -> list[dict[str, Any]]:
    """Figures of the done runs of a row that have both histograms."""
    ended = [records[e.key] for e in row.experiments["defender"] if e.key in records]
    return [r.figures for r in ended if r.figures.get("triggered_mean") is not None]


def _histogram(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    """Shares of the first run's clean and triggered images; a score is minus the entropy."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if not runs:
        axes.text(0.5, 0.4, "not run", transform=axes.transAxes, ha="center", fontsize=7)
        return
    low, high = runs[0]["range"]
    for name, colour in PARTS.items():
        counts = np.asarray(runs[0][f"{name}_histogram"], float)[::-1]
        edges = -np.linspace(low, high, len(counts) + 1)[::-1]
        axes.stairs(counts / counts.sum(), edges, fill=True, alpha=0.55, color=colour)


def _gap(runs: Iterable[dict[str, Any]]) -> Spread | None:
    """Mean entropy of clean images minus that of triggered ones, in bits, by run."""
    gaps = tuple(run["triggered_mean"] - run["clean_mean"] for run in runs)
    return Spread(gaps) if gaps else None
