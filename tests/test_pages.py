"""The generated pages are what the records say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from reprune.benchmark.store import Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def names_of(monkeypatch):
    """What a script in `examples/` defines, by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    return lambda script: runpy.run_path(str(ROOT / "examples" / script))


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("auto_page.py", "auto-results.md"),
        ("comparison_page.py", "comparison.md"),
        ("onp_page.py", "onp-results.md"),
        ("results_page.py", "results.md"),
    ],
)
def test_the_page_is_what_the_records_say(script, page, names_of):
    """The script was run after the last record was made."""
    scope = names_of(script)
    assert scope["page"](ROOT / "docs/results") == (ROOT / "docs" / page).read_text()


def test_readme_and_scan_say_what_the_records_say(names_of):
    scope = names_of("auto_page.py")
    found = scope["usual"](Store(ROOT / "docs/results/bench").records().values())
    assert scope["calibration"](found) == scope["CALIBRATION"].read_text()
    runs = scope["latest"](ROOT / "docs/results")
    assert scope["short"](found, runs) in (ROOT / "README.md").read_text()


def test_runs_that_were_made_anew_are_told_beside_the_earlier_ones(names_of):
    scope = names_of("auto_today.py")

    def made(model: str, drop: float, asr: float, **more: object) -> dict[str, object]:
        figures = {"ca before": 90.0, "ca after": 90.0 - drop, "asr after": asr}
        return {"model": model, "draw": 1, "hardware": "a processor", **figures, **more}

    old, other = made("a", 2.0, 1.0), made("b", 1.0, 1.0)
    new = made("a", 1.0, 4.0, tested=10_000)
    assert scope["again"]([old, other], [old, other]) == ""
    said = " ".join(scope["again"]([new, other], [old, other, new]).split())
    assert said.startswith("1 of these runs, of draw 1, were made before: then on a processor")
    assert "mean CA drop was 2.00 then (worst 2.00) and is 1.00" in said
    assert "CA drops differ by 1.0 points and ASR by 3.0" in said
