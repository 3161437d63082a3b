"""The generated pages are what the records say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from reprune.benchmark.store import Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("auto_page.py", "auto-results.md"),
        ("comparison_page.py", "comparison.md"),
        ("onp_page.py", "onp-results.md"),
        ("results_page.py", "results.md"),
    ],
)
def test_the_page_is_what_the_records_say(script, page, monkeypatch):
    """The script was run after the last record was made."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    scope = runpy.run_path(str(ROOT / "examples" / script))
    assert scope["page"](ROOT / "docs/results") == (ROOT / "docs" / page).read_text()


def test_readme_and_scan_say_what_the_records_say(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    scope = runpy.run_path(str(ROOT / "examples" / "auto_page.py"))
    found = scope["usual"](Store(ROOT / "docs/results/bench").records().values())
    assert scope["calibration"](found) == scope["CALIBRATION"].read_text()
    assert (
        scope["short"](found, scope["latest"](ROOT / "docs/results"))
        in (ROOT / "README.md").read_text()
    )
