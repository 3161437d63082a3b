"""`reprune bench`: what it lists, runs, shows and refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reprune import demo
from reprune.benchmark.catalog import TABLES, table
from reprune.benchmark.record import Record
from reprune.benchmark.store import Store


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "shipped"
    folder.mkdir(parents=True)
    for name in ("card.json", "model.safetensors", "trigger.npz"):
        shutil.copy(demo.folder() / name, folder / name)
    return folder.parent


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Records of some experiments of table 15, one of them failed."""
    records = []
    for number, e in enumerate(table("table15", "small").experiments()[:12]):
        figures = {"ca": 80.0 + number / 10, "asr": 5.0, "ra": 70.0}
        good = {"status": "done", "before": figures, "after": figures, "seconds": 60.0}
        bad = {"status": "failed", "error": "ValueError: no"}
        records.append(Record(key=e.key, experiment=e, **(bad if number == 3 else good)))
    Store(tmp_path / "store").add(records)
    return tmp_path / "store"


def test_list_counts_what_is_done(reprune, store):
    rows = {r["table"]: r for r in reprune("bench", "list", "--store", store, "--json").json()}
    assert list(rows) == list(TABLES)
    assert (rows["table15"]["done"], rows["table15"]["failed"]) == (11, 1)
    assert rows["table15"]["experiments"] == 120
    assert "table15" in reprune("bench", "list", "--store", store).out


def test_another_precision_is_shown_where_it_ran(reprune, store):
    Store(store).add(
        Record(key=(other := replace(e, precision="float32")).key, experiment=other, status="done")
        for e in table("table15", "small").experiments()[:2]
    )
    options = ("--store", store, "--precision", "float32", "--json")
    rows = {row["table"]: row for row in reprune("bench", "list", *options).json()}
    assert rows["table15"]["done"] == 2
    shown = reprune("bench", "show", "table15", *options).json()
    assert sum("not run" in row["ASR"] for row in shown) == len(shown) - 1


def test_show_puts_printed_beside_measured(reprune, store):
    rows = reprune("bench", "show", "table15", "--store", store, "--json").json()
    first = next(r for r in rows if (r["attack"], r["method"]) == ("badnets", "nc+ft"))
    assert first["ASR, paper"] == "8.31"
    assert first["ASR"].startswith("5.0")
    assert any("not run" in r["ASR"] for r in rows)


def test_show_fits_a_terminal_and_reads_line_by_line(reprune, store):
    lines = reprune("bench", "show", "table15", "--store", store, columns=80).out.splitlines()
    assert lines[0].startswith("RNP, Table 15")
    assert "(cifar10)" in lines[0] + lines[1]
    assert all(len(line) <= 80 for line in lines)
    first = next(line for line in lines if line.split()[:2] == ["badnets", "nc+ft"])
    assert first.split()[2:4] == ["defender", "3/3"]
    assert first.split()[4].startswith("5.0")
    assert "8.31" in first


def test_a_dry_run_says_what_would_run(reprune, store):
    outcome = reprune("bench", "run", "table15", "--store", store, "--dry-run")
    assert outcome.status == 0
    assert "108 of 120 experiments in 108 runs; 12 have a record" in outcome.out
    assert "1 models to train first" in outcome.out
    assert "wanet" in outcome.out
    again = reprune("bench", "run", "table15", "--store", store, "--dry-run", "--retry")
    assert "109 of 120 experiments" in again.out
    halves = [
        reprune("bench", "run", "table15", "--store", store, "--dry-run", "--shard", f"{i}/2").out
        for i in range(2)
    ]
    counts = [int(out.partition(" experiments in ")[0].split()[-1]) for out in halves]
    assert sum(counts) == 120


def test_given_models_are_planned_and_a_dry_run_makes_no_store(reprune, models, tmp_path):
    store = tmp_path / "new"
    options = ("--models", models, "--images", "cifar10=demo", "--only", "clp")
    dry = reprune("bench", "run", "defenses", *options, "--store", store, "--dry-run")
    keys = [line for line in dry.out.splitlines() if "models:shipped" in line]
    assert len(keys) == 3
    assert not store.exists()


def test_queries_and_comparisons(reprune, store):
    sql = "SELECT method, count(*) AS n FROM records GROUP BY method ORDER BY method"
    assert reprune("bench", "query", sql, "--store", store, "--json").json()[0]["n"] == 3
    found = reprune("bench", "compare", "nc+ft", "nu+nc+ft", "--store", store, "--json").json()
    assert {row["value"] for row in found} >= {"asr", "ca"}
    assert "nc+ft" in reprune("bench", "compare", "nc+ft", "nu+nc+ft", "--store", store).out
    empty = reprune("bench", "query", "SELECT * FROM records WHERE draw = 99", "--store", store)
    assert "no rows; the columns of records are key, outcome, status" in empty.out


def test_export_writes_page_tables_and_records(reprune, store, tmp_path):
    outcome = reprune("bench", "export", "--store", store, "--output", tmp_path / "page")
    assert outcome.status == 0, outcome.err
    files = {path.name for path in (tmp_path / "page").iterdir()}
    assert {"leaderboard.html", "records.parquet", "table15.csv", "table15.tex"} <= files
    assert "table13.csv" not in files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "table99"), "unknown table 'table99'; known are table2, table3"),
        (("run", "table2", "--shard", "5/3"), "a shard is i/n"),
        (("run", "table2", "--only", "magic"), "no magic here; there are none, fp"),
        (("run", "table2", "--images", "cifar10"), "--images takes NAME=FOLDER"),
        (("run", "smoke", "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("run", "smoke", "--ray-address", "127.0.0.1:9"), "no Ray cluster at '127.0.0.1:9'"),
        (("show", "table99"), "unknown table"),
        (("compare", "rnp", "nonsense"), "no model and draw"),
        (("query", "SELECT nothing"), "the query failed"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(reprune, tmp_path, arguments, message):
    pytest.importorskip("ray")
    outcome = reprune("bench", *arguments, "--store", tmp_path / "store")
    assert outcome.status == 2
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "store" / "records.jsonl").exists()


def test_a_store_of_a_newer_version_is_refused(reprune, tmp_path):
    (tmp_path / "store.json").write_text(json.dumps({"format": 2}))
    outcome = reprune("bench", "list", "--store", tmp_path)
    assert outcome.status == 2
    assert "was written in format 2" in " ".join(outcome.err.split())
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": 2}
