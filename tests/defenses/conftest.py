"""What one scan saw, for what happens after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_auto import AUTO, CLEAN, generator

import planted
from reprune.detection import Evidence, Joint, Scan
from reprune.types import silent


@pytest.fixture
def looked(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scan sees what one saw."""
    monkeypatch.setattr(Scan, "gather", lambda *_, **__: evidence)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    scan = replace(AUTO.scan, unlearning=None, joint=Joint(steps=40, images=8))
    return scan.gather(planted.model(True), CLEAN, generator=generator(), progress=silent)
