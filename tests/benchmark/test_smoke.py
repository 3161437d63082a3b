"""A whole sweep at toy size: killed, resumed, exported, and its page read in a browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from reprune.benchmark.catalog import table
from reprune.benchmark.record import Record
from reprune.benchmark.store import Store
from reprune.cli.app import app

pytestmark = pytest.mark.smoke

EXPERIMENTS = {e.key: e for e in table("smoke", "small").experiments()}


def bench(*arguments: str | Path) -> str:
    """What `reprune bench ...` prints; it must succeed."""
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def sweep(store: Path) -> list[str]:
    where = ["--store", str(store), "--device", "cpu"]
    return ["run", "smoke", *where, "--workers", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store whose sweep was killed in the middle and started again."""
    folder = tmp_path_factory.mktemp("smoke") / "store"
    command = [sys.executable, "-m", "reprune", "bench", *sweep(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as first:
        for _ in range(2400):
            if len(Store(folder).records()) >= 4 or first.poll() is not None:
                break
            time.sleep(0.1)
        assert first.poll() is None, "the sweep ended before it could be killed"
        os.killpg(first.pid, signal.SIGKILL)
    before = Store(folder).records()
    assert 4 <= len(before) < len(EXPERIMENTS)
    done = bench(*sweep(folder))
    assert f"{len(EXPERIMENTS) - len(before)} experiments done, 0 failed" in done
    after = Store(folder)
    assert {key: after.records()[key] for key in before} == before
    return after


def test_every_experiment_has_one_record(store: Store) -> None:
    records = store.records()
    assert set(records) == set(EXPERIMENTS)
    assert {r.status for r in records.values()} == {"done"}
    assert len(store.lines.read_text().splitlines()) == len(EXPERIMENTS)


def test_nothing_is_left_to_do(store: Store) -> None:
    assert "nothing to do" in bench(*sweep(store.path))
    assert "0 of 14 experiments" in bench(*sweep(store.path), "--dry-run")


def test_tables_and_comparisons_show_it(store: Store) -> None:
    shown = json.loads(bench("show", "smoke", "--store", store.path, "--json"))
    assert len(shown) == 8
    assert all("not run" not in row.values() for row in shown)
    tuned = "ft finetuning.epochs=2"
    found = json.loads(bench("compare", tuned, "clp", "--store", store.path, "--json"))
    assert found[0]["pairs"] == 4
    counts = bench("query", "SELECT count(*) AS n FROM records", "--store", store.path, "--json")
    assert json.loads(counts) == [{"n": len(EXPERIMENTS)}]


def test_the_page_is_read_in_a_browser(store: Store, tmp_path: Path) -> None:
    bench("export", "--store", store.path, "--output", tmp_path / "page")
    assert pq.read_table(tmp_path / "page" / "records.parquet").num_rows == len(EXPERIMENTS)
    assert (tmp_path / "page" / "smoke.tex").exists()
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium found: the page was written but not opened")
    records = list(store.records().values())
    with api.sync_playwright() as play:
        window = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = window.new_page()
        page.goto((tmp_path / "page" / "leaderboard.html").as_uri() + "#attack=blend")
        page.wait_for_selector("section[data-task=removal] .summary tbody tr")
        for way in ("ascending", "descending"):
            header = page.locator(f"{SUMMARY} th[data-name=asr] button").first
            header.click()
            if page.locator(f"{SUMMARY} th[data-name=asr]").first.get_attribute("aria-sort") != way:
                header.click()
            shown = page.locator(f"{SUMMARY} tbody tr").all_inner_texts()
            order = [text.split()[0] for text in shown if text.split()[0] != "none"]
            assert order == _by_asr(records, "blend", reverse=way == "descending")
        window.close()


SUMMARY = "section[data-task=removal] table.summary"


def _by_asr(records: list[Record], attack: str, *, reverse: bool) -> list[str]:
    means: dict[str, list[float]] = {}
    for record in records:
        spec = record.experiment
        if spec.model.attack == attack and spec.method != "none":
            means.setdefault(spec.method, []).append(record.after["asr"])
    return sorted(means, key=lambda m: sum(means[m]) / len(means[m]), reverse=reverse)
