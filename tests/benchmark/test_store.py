"""The store: appended whole, queried, never overwritten by an older version."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reprune.benchmark.record import COLUMNS, Record, row, rows
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.benchmark.store import Store
from reprune.errors import DataError
from reprune.metrics import defense_effectiveness


def test_records_come_back_as_they_were(tmp_path: Path, record) -> None:
    first, second = record("rnp"), record("anp", status="failed", error="ValueError: no")
    store = Store(tmp_path / "new" / "store")
    assert store.records() == {}
    store.add([first])
    store.add([second])
    assert Store(store.path).records() == {first.key: first, second.key: second}


def test_the_last_record_of_a_key_counts(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add([record(status="failed", error="x"), record("anp")])
    store.add([record(asr=3.0)])
    kept = list(store.records().values())
    assert [r.experiment.method for r in kept] == ["rnp", "anp"]
    assert kept[0].after["asr"] == 3.0


def test_a_line_that_was_cut_off_does_not_count_and_goes(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add([record("rnp")])
    with store.lines.open("a") as lines:
        lines.write('{"key": "half')
    assert len(store.records()) == 1
    store.add([record("anp")])
    assert len(store.records()) == 2
    assert len(store.lines.read_text().splitlines()) == 2


def test_a_damaged_line_is_named(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add([record()])
    store.lines.write_text(store.lines.read_text() + '{"key": 3}\n')
    with pytest.raises(DataError, match="line 2 is no record"):
        store.records()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ('{"format": 99}', "written in format 99, this version of reprune knows format 1"),
        ("{}", "is damaged"),
        ("[", "is damaged"),
    ],
)
def test_a_store_of_another_version_is_refused_and_left_alone(
    tmp_path: Path, head: str, message: str
) -> None:
    (tmp_path / "store.json").write_text(head)
    (tmp_path / "records.jsonl").write_text("what a newer version writes\n")
    with pytest.raises(DataError, match=message):
        Store(tmp_path)
    assert (tmp_path / "store.json").read_text() == head
    assert (tmp_path / "records.jsonl").read_text() == "what a newer version writes\n"


def test_records_without_a_head_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"no store\.json"):
        Store(tmp_path)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        Store(tmp_path / "file")


def _write(path: Path, writer: int) -> None:
    store = Store(path)
    for draw in range(20):
        spec = Experiment(model=ModelSpec(seed=writer), draw=draw)
        store.add([Record(key=spec.key, experiment=spec, status="done", notes=("x" * 5000,))])


def test_many_writers_do_not_corrupt_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(Store(tmp_path).records()) == 60
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 60


def test_a_claim_holds_against_others_and_ends(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    with first.claim("a") as ours:
        assert ours
        with second.claim("a") as theirs:
            assert not theirs
        with second.claim("b") as other:
            assert other
    with second.claim("a") as theirs:
        assert theirs


def test_queries_see_the_columns(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add([record("rnp", asr=2.0), record("rnp", asr=4.0, draw=1), record("anp", asr=50.0)])
    found = store.query(
        "SELECT method, avg(asr) AS asr, count(*) AS runs FROM records GROUP BY 1 ORDER BY 2"
    )
    assert found == [
        {"method": "rnp", "asr": 3.0, "runs": 2},
        {"method": "anp", "asr": 50.0, "runs": 1},
    ]
    assert store.query("SELECT count(*) AS n FROM records WHERE draw = ?", [1]) == [{"n": 1}]
    names = store.query("SELECT column_name AS n, column_type AS t FROM (DESCRIBE records)")
    assert {one["n"]: one["t"] for one in names} == COLUMNS


def test_bad_sql_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the query failed"):
        Store(tmp_path).query("SELECT nonsense FROM records")


def test_queries_cannot_read_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="the query failed"):
        Store(tmp_path).query(f"SELECT * FROM '{tmp_path / 'secret.csv'}'")


def test_the_table_goes_to_parquet(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add([record(asr=2.5)])
    pq.write_table(store.table(), tmp_path / "r.parquet")
    back = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert back[0]["asr"] == 2.5
    assert back[0]["width"] == 16


def test_a_row_derives_drop_der_and_excess(record) -> None:
    flat = row(record(asr=3.0, ca=90.0, figures={"floor": 1.0}))
    assert flat["ca_drop"] == 2.0
    assert flat["excess"] == 2.0
    assert flat["der"] == pytest.approx(100 * defense_effectiveness(97.0, 2.0))
    assert flat["der"] == pytest.approx((97 - 2 + 100) / 2)


def test_a_clean_model_has_no_der(record) -> None:
    flat = row(record(before={"ca": 90.0}, after={"ca": 88.0}))
    assert (flat["ca_drop"], flat["der"], flat["asr"], flat["excess"]) == (2.0, None, None, None)


def test_the_floor_of_a_model_serves_all_its_records(record) -> None:
    measured = record("none", asr=100.0, figures={"floor": 1.5})
    flat = rows([record("rnp", asr=3.0), measured, record("rnp", attack="blend")])
    assert [one["excess"] for one in flat] == [1.5, 98.5, None]


def test_a_failed_record_has_no_figures(record) -> None:
    flat = row(record(status="failed", before={}, after={}, error="x"))
    assert flat["asr"] is None
    assert flat["ca_drop"] is None
    assert flat["status"] == "failed"


def test_numbers_are_strict_json(tmp_path: Path, record) -> None:
    store = Store(tmp_path)
    store.add([record(figures={"scores": [[0, None, float("inf")]]})])
    assert json.loads(store.lines.read_text())["figures"]["scores"][0][2] in (None, "inf")
