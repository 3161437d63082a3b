"""A table: rows of experiments, and what the paper prints for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reprune.benchmark.published import printed
from reprune.benchmark.spec import Experiment, Selection, Task


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        where: what the line is about, with the keys of the published rows.
        experiments: over models, seeds and draws, by selection.
    """

    where: dict[str, Any]
    experiments: dict[Selection, tuple[Experiment, ...]]


@dataclass(frozen=True)
class Table:
    """One table or figure in one profile.

    Attributes:
        name: `table2`, `figure3`, ...
        title: in words, with its source.
        profile: "small" or "paper".
        rows: in order.
        kind: what the experiments do.
        numbers: name of the published numbers.
        drawn: whether the paper shows it as a figure.
    """

    name: str
    title: str
    profile: str
    rows: tuple[Row, ...]
    kind: Task = "removal"
    numbers: str = ""
    drawn: bool = False

    def experiments(self) -> list[Experiment]:
        """All experiments once, in the order of the rows."""
        every = [e for row in self.rows for es in row.experiments.values() for e in es]
        return list({e.key: e for e in every}.values())

    def labels(self) -> list[str]:
        """What the rows are told apart by: the names in their `where`."""
        return list(dict.fromkeys(key for row in self.rows for key in row.where))

    def selections(self) -> list[Selection]:
        """Who chose, in any of the rows."""
        return list(dict.fromkeys(s for row in self.rows for s in row.experiments))

    def printed(self, row: Row) -> dict[str, float]:
        """What the paper prints for a row; empty where it prints nothing."""
        return printed(self.numbers or self.name, row.where)
