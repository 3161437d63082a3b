"""Tables from records: means, intervals, what is missing, and paired comparisons."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from reprune.benchmark.catalog import table
from reprune.benchmark.export import as_csv, as_latex, as_markdown, body, head
from reprune.benchmark.measured import Spread, compare, lines
from reprune.benchmark.record import Record
from reprune.benchmark.spec import Experiment
from reprune.benchmark.store import Store
from reprune.errors import DataError

TABLE = table("table15", "small")


def _records(experiments: list[Experiment], asr: dict[int, float]) -> dict[str, Record]:
    found = {}
    for e in experiments:
        if e.draw in asr:
            after = {"ca": 80.0, "asr": asr[e.draw], "ra": 70.0}
            found[e.key] = Record(key=e.key, experiment=e, status="done", before=after, after=after)
    return found


def test_a_line_is_the_mean_over_draws_beside_the_printed_value() -> None:
    row = next(r for r in TABLE.rows if r.where["attack"] == "blend")
    experiments = list(row.experiments["defender"])
    found = lines(TABLE, _records(experiments, {0: 1.0, 1: 2.0, 2: 6.0}))
    line = next(one for one in found if one.row is row)
    (cell,) = line.cells
    assert (cell.planned, cell.done, cell.failed) == (3, 3, 0)
    assert cell.values["asr"].mean == 3.0
    assert line.printed == {"asr": 3.71, "ca": 92.63}
    assert line.difference(cell, "asr") == pytest.approx(3.0 - 3.71)
    assert cell.text("asr") == "3.0 (1.0 to 6.0)"
    assert cell.text("ca") == "80.0"
    assert cell.text("channels") == "–"


def test_what_did_not_run_or_failed_is_said() -> None:
    experiments = list(TABLE.rows[0].experiments["defender"])
    one = _records(experiments, {0: 1.0})
    assert lines(TABLE, one)[0].cells[0].text("asr") == "1.0 [1 of 3]"
    assert lines(TABLE, {})[0].cells[0].text("asr") == "not run"
    broken = {
        k: replace(r, status="failed", after={}, before={}, error="x") for k, r in one.items()
    }
    assert lines(TABLE, broken)[0].cells[0].text("asr") == "failed"
    assert lines(TABLE, broken)[0].cells[0].failed == 1


def test_intervals_are_those_of_a_t_test() -> None:
    values = (1.0, 2.0, 6.0)
    low, high = Spread(values).interval
    wanted = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem(values))
    assert (low, high) == pytest.approx(wanted)
    assert Spread((1.0,)).interval is None


def test_a_table_of_labels_counts_right_classes_and_false_alarms() -> None:
    one = table("table16", "small")
    found = {}
    for row in one.rows:
        for e in row.experiments["defender"]:
            clean = e.model.attack == "clean"
            figures = {
                "verdict": "backdoored" if e.draw == 0 else "clean",
                "top": 0 if e.draw < 2 else 5,
                "target": None if clean else 0,
            }
            found[e.key] = Record(key=e.key, experiment=e, status="done", figures=figures)
    by = {line.row.where["attack"]: line.cells[0] for line in lines(one, found)}
    assert by["blend"].values["detected"].mean == pytest.approx(200 / 3)
    assert by["clean"].values["alarm"].mean == pytest.approx(100 / 3)
    assert "detected" not in by["clean"].values


def test_selections_stand_in_their_own_columns() -> None:
    one = table("table2", "small")
    columns = head(one)
    assert "ASR, defender" in columns
    assert "ASR, oracle" in columns
    assert columns[3:5] == ["ASR, paper", "CA, paper"]
    row = next(r for r in one.rows if "oracle" in r.experiments)
    records = _records(list(row.experiments["oracle"]), {0: 0.5, 1: 0.5, 2: 0.5})
    line = body(one, records)[one.rows.index(row)]
    printed = one.printed(row)["asr"]
    assert line[columns.index("ASR, oracle")] == f"0.5, {0.5 - printed:+.1f}"
    assert line[columns.index("ASR, defender")] == "not run"


def test_markdown_and_latex_have_a_line_a_row() -> None:
    records = _records(TABLE.experiments(), {0: 1.0})
    columns, rows = head(TABLE), body(TABLE, records)
    assert as_markdown(TABLE, records).count("\n|") == len(rows) + 2
    text = as_latex(TABLE, records)
    assert text.count(r"\\") == len(rows) + 1
    assert r"\begin{tabular}{" + "l" * len(columns) + "}" in text


def test_csv_has_intervals_and_differences() -> None:
    records = _records(TABLE.experiments(), {0: 1.0, 1: 2.0, 2: 6.0})
    rows = list(csv.DictReader(io.StringIO(as_csv(TABLE, records))))
    row = next(
        r for r in rows if (r["attack"], r["method"], r["value"]) == ("blend", "nc+ft", "asr")
    )
    low, high = Spread((1.0, 2.0, 6.0)).interval
    assert float(row["mean"]) == 3.0
    assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high), abs=1e-3)
    assert (row["least"], row["most"], row["runs"], row["planned"]) == ("1.0", "6.0", "3", "3")
    assert (row["paper"], float(row["difference"])) == ("3.71", pytest.approx(-0.71))
    missing = list(csv.DictReader(io.StringIO(as_csv(TABLE, {}))))
    assert {r["mean"] for r in missing} == {""}
    assert {r["runs"] for r in missing} == {"0"}


def test_latex_is_escaped() -> None:
    one = replace(TABLE, title="50 % & a_b")
    assert r"50 \% \& a\_b" in as_latex(one, {})


def test_a_comparison_is_paired(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add(
        [
            *(record("rnp", asr=asr, draw=d) for d, asr in enumerate((1.0, 2.0, 3.0))),
            *(record("anp", asr=asr, draw=d) for d, asr in enumerate((11.0, 13.0, 12.0))),
            record("anp", asr=99.0, draw=9),
            record("rnp", asr=50.0, draw=9, status="failed"),
            record("rnp", asr=70.0, draw=9, selection="oracle"),
        ]
    )
    found = {one["value"]: one for one in compare(store, "rnp", "anp", "defender")}
    assert found["asr"]["pairs"] == 3
    assert found["asr"]["difference"] == pytest.approx(-10.0)
    wanted = stats.ttest_rel((1.0, 2.0, 3.0), (11.0, 13.0, 12.0)).confidence_interval()
    assert (found["asr"]["low"], found["asr"]["high"]) == pytest.approx(tuple(wanted))
    assert "excess" not in found
    with pytest.raises(DataError, match="no model and draw"):
        compare(store, "rnp", "nad", "defender")


def test_a_repair_is_compared_once_and_with_its_like_alone(tmp_path: Path, record) -> None:
    store, more = Store(tmp_path), ("figures", "reactivation")
    store.add(
        [
            *(record("rnp", asr=2.0, metrics=m) for m in (("figures",), more)),
            *(record("anp", asr=5.0, metrics=m) for m in (("figures",), more)),
            record("anp", asr=90.0, part="test"),
            record("anp", asr=90.0, precision="float32"),
        ]
    )
    found = {one["value"]: one for one in compare(store, "rnp", "anp", "defender")}
    assert (found["asr"]["pairs"], found["asr"]["difference"]) == (1, -3.0)
