"""From records to the lines of a table: means, spreads, and the paper's numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from reprune.benchmark.extra import needed
from reprune.benchmark.record import Record, row
from reprune.benchmark.spec import NONE, Selection, Task
from reprune.benchmark.store import Store
from reprune.benchmark.table import Row, Table
from reprune.errors import DataError

VALUES: dict[Task, dict[str, str]] = {
    "removal": {"asr": "ASR", "ca": "CA", "channels": "channels"},
    "detection": {"detected": "right class", "alarm": "called backdoored"},
    "filtering": {"auroc": "AUROC"},
}
"""What a table of each kind shows: name and heading; rates in percent."""


@dataclass(frozen=True)
class Spread:
    """The values of one cell over seeds and draws.

    Attributes:
        values: one a run.
        mean: their mean.
        interval: 95 % t-interval of the mean; `None` for fewer than two values.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        count = len(self.values)
        if count < 2:
            return None
        quantile = float(needed("scipy.stats").t.ppf(0.975, count - 1))
        half = quantile * stdev(self.values) / math.sqrt(count)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        """Mean, and the smallest and largest value where they differ by more than 2."""
        low, high = min(self.values), max(self.values)
        return f"{self.mean:.1f}" + (f" ({low:.1f} to {high:.1f})" if high - low > 2 else "")


@dataclass(frozen=True)
class Cell:
    """One selection of one row.

    Attributes:
        selection: who chose.
        planned, done, failed: numbers of experiments; the others have not run.
        values: by the names of `VALUES`; empty where nothing was measured.
    """

    selection: Selection
    planned: int
    done: int
    failed: int
    values: dict[str, Spread]

    def text(self, name: str) -> str:
        """A value for people: "not run", "failed", a dash where it does not apply."""
        if name in self.values:
            missing = self.planned - self.done
            return str(self.values[name]) + (f" [{self.done} of {self.planned}]" if missing else "")
        if self.failed:
            return "failed"
        return "–" if self.done else "not run"


@dataclass(frozen=True)
class Line:
    """One row with its cells and what the paper prints."""

    row: Row
    cells: tuple[Cell, ...]
    printed: dict[str, float]

    def difference(self, cell: Cell, name: str) -> float | None:
        """Measured minus printed, in points."""
        if name not in cell.values or name not in self.printed:
            return None
        return cell.values[name].mean - self.printed[name]


def lines(table: Table, records: Mapping[str, Record]) -> list[Line]:
    """The lines of a table from the records that are there."""
    found = []
    for one in table.rows:
        cells = tuple(
            _cell(selection, [e.key for e in experiments], table.kind, records)
            for selection, experiments in one.experiments.items()
        )
        found.append(Line(one, cells, table.printed(one)))
    return found


def _cell(
    selection: Selection, keys: Sequence[str], kind: Task, records: Mapping[str, Record]
) -> Cell:
    ended = [records[key] for key in keys if key in records]
    done = [record for record in ended if record.status == "done"]
    measured = [_values(record, kind) for record in done]
    names = dict.fromkeys(name for values in measured for name in values)
    spreads = {name: Spread(tuple(m[name] for m in measured if name in m)) for name in names}
    return Cell(selection, len(keys), len(done), len(ended) - len(done), spreads)


def _values(record: Record, kind: Task) -> dict[str, float]:
    flat = row(record)
    if kind == "removal":
        values = {"asr": flat["asr"], "ca": flat["ca"], "channels": flat["pruned"]}
        if record.experiment.method == NONE:
            values["channels"] = None
        return {name: float(value) for name, value in values.items() if value is not None}
    if kind == "detection":
        if flat["target"] is None:
            return {"alarm": 100.0 * (flat["verdict"] == "backdoored")}
        return {"detected": 100.0 * (flat["top"] == flat["target"])}
    return {"auroc": flat["auroc"]} if flat["auroc"] is not None else {}


def compare(store: Store, first: str, second: str, selection: str) -> list[dict[str, Any]]:
    """Two methods on the same models and draws: what the first has more than the second.

    A repair counts once, whatever else was measured of it.

    Args:
        store: the records.
        first, second: method and settings that differ from its own: `rnp`, `rnp score=mask`.
        selection: of both.

    Returns:
        One mapping for each of ASR, CA, RA and excess ASR: `value`, number of `pairs`, mean of
        each method, `difference` and its 95 % t-interval `low` to `high`, in points.

    Raises:
        DataError: no model and draw has records of both.
    """
    pairs = store.query(
        """
        WITH once AS (
            SELECT * FROM records WHERE task = 'removal' AND status = 'done' AND selection = ?
            QUALIFY row_number() OVER (PARTITION BY outcome ORDER BY key) = 1
        )
        SELECT a.asr AS asr_a, b.asr AS asr_b, a.ca AS ca_a, b.ca AS ca_b,
               a.ra AS ra_a, b.ra AS ra_b, a.excess AS excess_a, b.excess AS excess_b
        FROM once a JOIN once b
          ON a.model_key = b.model_key AND a.draw = b.draw AND a.seed = b.seed
         AND a.images = b.images AND a.test_images IS NOT DISTINCT FROM b.test_images
         AND a.precision = b.precision AND a.part = b.part
        WHERE trim(a.method || ' ' || a.settings) = ? AND trim(b.method || ' ' || b.settings) = ?
        """,
        (selection, first, second),
    )
    if not pairs:
        raise DataError(
            f"no model and draw in {store.path} has records of both {first} and {second} with "
            f"the selection {selection}"
        )
    result = []
    for name in ("asr", "ca", "ra", "excess"):
        both = [(p[f"{name}_a"], p[f"{name}_b"]) for p in pairs]
        both = [(a, b) for a, b in both if a is not None and b is not None]
        if not both:
            continue
        differences = Spread(tuple(a - b for a, b in both))
        low, high = differences.interval or (None, None)
        result.append(
            {
                "value": name,
                "pairs": len(both),
                first: fmean(a for a, _ in both),
                second: fmean(b for _, b in both),
                "difference": differences.mean,
                "low": low,
                "high": high,
            }
        )
    return result
