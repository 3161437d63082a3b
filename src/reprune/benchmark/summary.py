"""The leaderboard's tables: their columns, and the means in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from math import isfinite
from statistics import fmean, mode
from typing import Any, Literal

from reprune.benchmark.record import Record, rows
from reprune.benchmark.spec import NONE, Experiment

DASH = "–"

Kind = Literal["text", "number", "runs", "failed", "models", "mean", "share", "worst"]
"""What a cell is.

`text`, `number`: of one run; `runs`, `failed`, `models`: counts; `mean`: over models of means over
a model's runs, with the smallest and largest model; `share`: the same of values that are 0 or 100,
with counts; `worst`: the largest of all runs.
"""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: what the table is sorted by.
        title: its header.
        about: what it shows, in words.
        kind: how runs become a cell.
        field: of an entry; by default the name.
        clean: whether it is about clean models; otherwise it is about backdoored ones.
        better: which values are, where any are.
        digits: after the point.
        spread: whether the smallest and largest model are shown below a mean.
    """

    name: str
    title: str
    about: str = ""
    kind: Kind = "mean"
    field: str = ""
    clean: bool = False
    better: Literal["lower", "higher"] | None = None
    digits: int = 1
    spread: bool = True


@dataclass(frozen=True)
class Table:
    """A table for one task: groups of columns under a heading, and what it is sorted by at first.

    Attributes:
        groups: heading and columns.
        sort: name of a column, with "-" before it for the largest first.
    """

    groups: tuple[tuple[str, tuple[Column, ...]], ...]
    sort: str

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns in order."""
        return tuple(column for _, columns in self.groups for column in columns)


@dataclass(frozen=True)
class Cell:
    """A number, `None` for missing, and the small print below it."""

    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """What became of one method under one selection and one choice of settings.

    `cells` are those of the table's columns without the first, the method.
    """

    method: str
    detail: str
    selection: str
    cells: tuple[Cell, ...]


def entries(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of records with what the leaderboard filters, groups and counts by.

    Records of one repair that ended alike make one row, with all that was measured. To `COLUMNS`
    come `architecture` (with the width); `detail`, the settings that differ from the method's own,
    without the number of channels where an oracle chose it, the number of clean images where that
    differs between records, whether they are test images, and the precision where it is not the
    usual one; `entry`, one text for all that is averaged together;
    `clean`, whether the model has no backdoor; `detected`, `right`, `ranked` and `undecided` of a
    detector, 0 or 100, `None` where they do not apply.
    """
    flat = rows(list(records))
    several = len({one["images"] for one in flat if one["method"] != NONE}) > 1
    usual = mode([one["precision"] for one in flat]) if flat else None
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one, record in zip(flat, records, strict=True):
        made = one | _more(one, record.experiment, several, usual)
        same = found.get((one["outcome"], one["status"]), made)
        found[one["outcome"], one["status"]] = {
            name: same[name] if value is None else value for name, value in made.items()
        }
    return list(found.values())


def _more(
    row: dict[str, Any], spec: Experiment, several: bool, usual: str | None
) -> dict[str, Any]:
    oracle = spec.selection == "oracle"
    given = [
        f"{key}={value}"
        for key, value in spec.settings.items()
        if not (oracle and key.startswith("pruning."))
    ]
    if several and spec.method != NONE:
        given.append(f"{spec.images:,} images")
    if spec.part == "test":
        given.append("of the test part")
    if spec.precision != usual:
        given.append(spec.precision)
    detail = ", ".join(given)
    verdict, target = row["verdict"], row["target"]
    named = verdict is not None and target is not None
    return {
        "architecture": spec.model.arch + (f"-{spec.model.width}" if spec.model.width else ""),
        "detail": detail,
        "entry": f"{spec.method} / {spec.selection} / {detail}",
        "clean": spec.model.attack == "clean" and target is None,
        "detected": _hit(verdict == "backdoored", verdict is not None),
        "right": _hit(row["found"] == target, named),
        "ranked": _hit(row["top"] == target, named),
        "undecided": _hit(verdict == "undecided", verdict is not None),
    }


def _hit(hit: bool, applies: bool) -> float | None:
    return 100.0 * hit if applies else None


def summarize(entries: Iterable[dict[str, Any]], table: Table) -> list[Line]:
    """One line for all entries that go together, the baseline "none" first, the rest sorted.

    Args:
        entries: of one task.
        table: the columns.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: str(entry["entry"])):
        groups.setdefault(entry["entry"], []).append(entry)
    models = len({entry["model_key"] for group in groups.values() for entry in group})
    lines = [
        Line(
            group[0]["method"],
            group[0]["detail"],
            group[0]["selection"],
            tuple(_cell(column, group, models) for column in table.columns[1:]),
        )
        for group in groups.values()
    ]
    names = [column.name for column in table.columns[1:]]
    position, sign = names.index(table.sort.lstrip("-")), -1 if table.sort[0] == "-" else 1

    def rank(line: Line) -> tuple[bool, bool, float]:
        value = line.cells[position].value
        return line.method != NONE, value is None, sign * (value or 0.0)

    return sorted(lines, key=rank)


def _cell(column: Column, group: list[dict[str, Any]], models: int) -> Cell:
    if column.kind == "runs":
        return Cell(len(group))
    if column.kind == "failed":
        return Cell(sum(entry["status"] == "failed" for entry in group))
    done = [entry for entry in group if entry["status"] == "done"]
    if column.kind == "models":
        count = len({entry["model_key"] for entry in done})
        return Cell(count, f"of {models}" if count < models else "")
    values: dict[str, list[float]] = {}
    for entry in done:
        value = entry[column.field or column.name]
        counts = isinstance(value, int | float) and isfinite(value)
        if counts and entry["clean"] == column.clean:
            values.setdefault(entry["model_key"], []).append(value)
    if not values:
        return Cell()
    runs = [value for model in values.values() for value in model]
    if column.kind == "worst":
        return Cell(max(runs))
    means = [fmean(model) for model in values.values()]
    if column.kind == "share":
        return Cell(fmean(means), f"{sum(value > 0 for value in runs)} of {len(runs)}")
    low, high = (number(end, column.digits) for end in (min(means), max(means)))
    return Cell(fmean(means), f"{low} to {high}" if column.spread and len(means) > 1 else "")


def number(value: float | None, digits: int = 1) -> str:
    """A number as the page writes it: "1,234.5", "−0.3", a dash for `None`."""
    if value is None:
        return DASH
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded or abs(rounded):,}".replace("-", "\u2212")
