"""The rule by which the page of the default chooses among settings of its repair."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

ATTACKS = ("a", "b", "c", "d")


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import auto_settings

    return auto_settings


def runs(page, **costs):
    """Costs by setting and attack; a cost that is a string wakes above pruning."""
    usual = {page.DEFAULT: (1.0, 1.1, 0.9, 1.0)}
    return {
        name: {
            attack: page.Left(float(cost), 0.0, 50.0, isinstance(cost, str))
            for attack, cost in zip(ATTACKS, some, strict=True)
        }
        for name, some in (usual | costs).items()
    }


def test_a_clearly_lower_cost_is_chosen(page):
    found = runs(page, lower=(0.5, 0.6, 0.4, 0.5))
    assert page.first(found, ATTACKS) == "lower"
    assert page.stands(found, "lower", ATTACKS) == "lower"


def test_the_default_stands_within_the_error(page):
    found = runs(page, other=(0.2, 1.9, 0.1, 1.4))
    assert page.first(found, ATTACKS) == "other"
    assert page.stands(found, "other", ATTACKS) == page.DEFAULT


def test_waking_more_attacks_than_pruning_comes_before_cost(page):
    found = runs(page, sleepless=("0.1", 0.2, 0.1, 0.2))
    assert page.first(found, ATTACKS) == page.DEFAULT
    assert page.first(found, ATTACKS[1:]) == "sleepless"


def test_each_attack_is_left_out_of_its_own_choice(page):
    found = runs(page, sleepless=("0.1", 0.2, 0.1, 0.2))
    rows = [line.split(" | ") for line in page.left_out(found, ATTACKS).splitlines()[2:]]
    assert [row[1] for row in rows] == ["sleepless", *[page.DEFAULT] * 3]
    assert rows[0][4].startswith("0.1 (50.0)")
