"""Tables as CSV, LaTeX and Markdown, records as Parquet, and the page, in one folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from reprune.benchmark.catalog import TABLES, table
from reprune.benchmark.figures import FIGURES, write_figures
from reprune.benchmark.measured import VALUES, Line, lines
from reprune.benchmark.page import leaderboard
from reprune.benchmark.profiles import Profile
from reprune.benchmark.record import Record
from reprune.benchmark.store import Store
from reprune.benchmark.subjects import Subjects
from reprune.benchmark.table import Table
from reprune.files import atomic_directory


def export(
    store: Store,
    output: Path,
    profile: str | Profile,
    names: Sequence[str] | None = None,
    subjects: Subjects | None = None,
) -> None:
    """Write the leaderboard, all records and every table and figure that has any.

    `leaderboard.html`, `records.parquet`, a table as `NAME.csv`, `NAME.tex` and `NAME.md`, a figure
    as `NAME.svg`, pictures of models as `NAME.png`.

    Args:
        store: the records.
        output: the folder; whole or not at all.
        profile: of the tables.
        names: tables and figures; all that have a record by default.
        subjects: models and images; without them there are no pictures of models.

    Raises:
        UnknownNameError: no such table or profile.
        ConfigurationError: a picture was asked for by name without `subjects`.
        DataError: images for the pictures that are not there.
        OutputError: the folder cannot be written.
    """
    records = store.records()
    with atomic_directory(output) as folder:
        (folder / "leaderboard.html").write_text(leaderboard(records.values()), "utf-8")
        pq.write_table(store.table(), folder / "records.parquet")
        for name in [n for n in names or TABLES if n in TABLES or n not in FIGURES]:
            one = table(name, profile)
            if names or any(e.key in records for e in one.experiments()):
                for suffix, form in FORMS.items():
                    (folder / f"{name}.{suffix}").write_text(form(one, records), "utf-8")
        figures = [name for name in names if name in FIGURES] if names else None
        write_figures(folder, records, profile, figures, subjects)


def head(one: Table) -> list[str]:
    """Headings of `body`."""
    shown, selections = VALUES[one.kind], one.selections()
    columns = [*one.labels(), *(f"{shown[name]}, paper" for name in _printed(one))]
    alone = list(selections) == ["defender"]
    for selection in selections:
        columns += [title if alone else f"{title}, {selection}" for title in shown.values()]
    return columns


def body(one: Table, records: dict[str, Record]) -> list[list[str]]:
    """The cells of a table as text, one list a row."""
    return [
        [
            *(str(line.row.where.get(key, "")) for key in one.labels()),
            *(_number(line.printed.get(name)) for name in _printed(one)),
            *(
                _cell(line, selection, name)
                for selection in one.selections()
                for name in VALUES[one.kind]
            ),
        ]
        for line in lines(one, records)
    ]


def narrow(one: Table, records: dict[str, Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table for a terminal: the selections of a row below one another."""
    columns = [*one.labels(), "by", "runs"]
    for name, title in VALUES[one.kind].items():
        columns += [title, "paper (±)"] if name in _printed(one) else [title]
    cells = []
    for line in lines(one, records):
        where = [str(line.row.where.get(key, "")) for key in one.labels()]
        for cell in line.cells:
            figures = []
            for name in VALUES[one.kind]:
                figures.append(str(cell.values.get(name) or cell.text(name)))
                if name in _printed(one):
                    difference = line.difference(cell, name)
                    apart = "" if difference is None else f" ({difference:+.1f})"
                    figures.append(_number(line.printed.get(name)) + apart)
            cells.append([*where, cell.selection, f"{cell.done}/{cell.planned}", *figures])
    return columns, cells


def _printed(one: Table) -> list[str]:
    """The values of this kind that the paper prints."""
    there = {name for row in one.rows for name in one.printed(row)}
    return [name for name in VALUES[one.kind] if name in there]


def _cell(line: Line, selection: str, name: str) -> str:
    """The measured value, and behind it the difference from the printed one."""
    found = [cell for cell in line.cells if cell.selection == selection]
    if not found:
        return ""
    difference = line.difference(found[0], name)
    apart = "" if difference is None else f", {difference:+.1f}"
    return found[0].text(name) + apart


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


LONG = ("selection", "value", "mean", "low", "high", "least", "most", "runs", "planned", "failed")
"""Columns of `as_csv` after the keys of the rows, before the printed value and the difference."""


def as_csv(one: Table, records: dict[str, Record]) -> str:
    """A table as comma-separated values in long form: one line a row, selection and value.

    `mean`, its 95 % t-interval `low` to `high`, `least` and `most` are over seeds and draws;
    `paper` is the printed value and `difference` the measured mean minus it.
    """
    keys = one.labels()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, *LONG, "paper", "difference"])
    for line in lines(one, records):
        where = [line.row.where.get(key, "") for key in keys]
        for cell in line.cells:
            for name in VALUES[one.kind]:
                spread = cell.values.get(name)
                if spread is None and name not in line.printed and cell.done:
                    continue  # does not apply
                low, high = (spread.interval if spread else None) or (None, None)
                figures = (
                    [spread.mean, low, high, min(spread.values), max(spread.values)]
                    if spread
                    else [None] * 5
                )
                difference = line.difference(cell, name)
                writer.writerow(
                    [*where, cell.selection, name]
                    + ["" if v is None else round(v, 3) for v in figures]
                    + [cell.done, cell.planned, cell.failed, line.printed.get(name, "")]
                    + ["" if difference is None else round(difference, 3)]
                )
    return text.getvalue()


def as_markdown(one: Table, records: dict[str, Record]) -> str:
    """A table as Markdown, under its title."""
    columns = head(one)
    rule = ["---"] * len(columns)
    rows = [columns, rule, *body(one, records)]
    table_text = "\n".join("| " + " | ".join(_plain(c) for c in r) + " |" for r in rows)
    return f"{one.title} (profile {one.profile}).\n\n{table_text}\n"


def as_latex(one: Table, records: dict[str, Record]) -> str:
    """A table as LaTeX for the package booktabs."""
    columns = head(one)
    rows = [" & ".join(map(_latex, r)) + r" \\" for r in body(one, records)]
    lines_ = [
        rf"% {_latex(one.title)} (profile {one.profile})",
        rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
        r"\toprule",
        " & ".join(map(_latex, columns)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines_) + "\n"


FORMS: dict[str, Callable[[Table, dict[str, Record]], str]] = {
    "csv": as_csv,
    "md": as_markdown,
    "tex": as_latex,
}
"""How a table is written, by suffix."""


def _plain(text: Any) -> str:
    return str(text).replace("|", r"\|")


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "–": "--", "~": r"\textasciitilde{}"}
    special |= {c: "\\" + c for c in "&%$#_{}"} | {"^": r"\textasciicircum{}"}
    return "".join(special.get(c, c) for c in text)
