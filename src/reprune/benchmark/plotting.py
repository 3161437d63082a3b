"""What the benchmark's figures share: colours, the line about what is missing, bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from reprune.benchmark.catalog import table
from reprune.benchmark.measured import Line, Spread, lines
from reprune.benchmark.profiles import Profile, find_profile
from reprune.benchmark.record import Record
from reprune.benchmark.table import Table
from reprune.errors import DataError
from reprune.report.drawing import INK

WIDTH = 6.9
"""Inches: the width of a page's text, two columns."""

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito: told apart by people who see colours differently."""

MARKERS = "osD^vP*"
METHODS = {"rnp": "published settings", "rnp default": "defaults of this package"}
"""RNP in the tables of the paper's figures: name of the row, and what it is."""

SPREAD = "mean and range over the runs"
NOTE: dict[str, Any] = {"x": 1.0, "ha": "right", "fontsize": 7, "color": "#52606d"}
PANEL: dict[str, Any] = {"loc": "left", "fontweight": "bold"}
RANGE: dict[str, Any] = {"elinewidth": 0.8, "capsize": 1.6, "capthick": 0.8}

Records = Mapping[str, Record]


class NothingToDrawError(DataError):
    """None of the experiments of a figure has a record."""


@dataclass(frozen=True)
class Found:
    """The lines of a figure's table, and what to say below it."""

    table: Table
    lines: list[Line]
    note: str

    def by(self, key: str) -> dict[Any, list[Line]]:
        """The lines by what they are about, in the order of the table."""
        groups: dict[Any, list[Line]] = {}
        for line in self.lines:
            groups.setdefault(line.row.where[key], []).append(line)
        return groups


def sized(profile: str | Profile) -> Profile:
    """The profile, or that of a name."""
    return find_profile(profile) if isinstance(profile, str) else profile


def find(name: str, records: Records, profile: str | Profile, said: str = SPREAD) -> Found:
    """What the records say about the table behind a figure.

    Raises:
        NothingToDrawError: no experiment of it is done.
    """
    one = table(name, profile)
    keys = [experiment.key for experiment in one.experiments()]
    ended = [records[key].status for key in keys if key in records]
    if "done" not in ended:
        raise NothingToDrawError(
            f"nothing to draw: no experiment of {name} in profile {one.profile} is done; "
            f"reprune bench run {name}"
        )
    failed, left = ended.count("failed"), len(keys) - len(ended)
    gaps = [f"{left} of {len(keys)} experiments not run"] if left else []
    gaps += [f"{failed} of {len(keys)} failed"] if failed else []
    return Found(one, lines(one, records), "; ".join([said, *gaps]))


def described(figure: Figure, title: str, note: str = "", place: Any | None = None) -> Figure:
    """The figure with a line at its bottom (of `place`, a part of it), and described."""
    if note:
        fitting = textwrap.wrap(note, round(19 * figure.get_figwidth()))
        (place or figure).supxlabel("\n".join(fitting), **NOTE)
    figure.set_label(". ".join([title, *([note] if note else []), ""]).strip())
    return figure


def bars(
    axes: Any,
    spreads: Sequence[Spread | None],
    shift: float,
    colour: str,
    label: str,
    form: str = "",
) -> None:
    """Bars of the means, beside the places 0, 1, ...; those without a value are left out."""
    there = {place: spread for place, spread in enumerate(spreads) if spread is not None}
    if not there:
        return
    drawn = axes.bar(
        [place + shift for place in there],
        [spread.mean for spread in there.values()],
        0.36,
        yerr=reach(list(there.values())),
        color=colour,
        ecolor=INK,
        error_kw=RANGE,
        label=label,
    )
    if form:
        axes.bar_label(drawn, fmt=form, padding=1, fontsize=7)
    axes.grid(axis="y")


def reach(spreads: Sequence[Spread | None]) -> list[list[float]]:
    """How far the smallest and the largest of several values lie from the mean; NaN for fewer."""
    nothing = (math.nan, math.nan)
    pairs = [
        (s.mean - min(s.values), max(s.values) - s.mean)
        if s is not None and len(s.values) > 1
        else nothing
        for s in spreads
    ]
    return [[max(low, 0.0) for low, _ in pairs], [max(high, 0.0) for _, high in pairs]]
