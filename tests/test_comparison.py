"""The page of comparisons is what its records say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_the_records_say(monkeypatch):
    """`examples/comparison_page.py` was run after the last record was made."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    scope = runpy.run_path(str(ROOT / "examples/comparison_page.py"))
    page = scope["page"](ROOT / "docs/results")
    assert page == (ROOT / "docs/comparison.md").read_text()
