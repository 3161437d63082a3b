"""Of very many classes some are searched."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from seen import recovered

import planted
from reprune.detection import Joint, Scan, narrowing
from reprune.detection.evidence import Evidence, rivals
from reprune.detection.inversion import Inversion, Inverted
from reprune.detection.narrowing import chosen, short_searches
from reprune.detection.signs import added_signs
from reprune.types import silent

CLEAN = planted.stripes(120, seed=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def search(classes: int, easy: list[int]) -> list[tuple[float, float]]:
    """What a search found: one size after the other for some classes, none for the rest."""
    return [(float(easy.index(k)) if k in easy else math.inf, 0.0) for k in range(classes)]


def test_the_first_of_each_search_and_others_are_searched(monkeypatch):
    monkeypatch.setattr(narrowing, "FIRST", 2)
    monkeypatch.setattr(narrowing, "OTHERS", 5)
    searches = [search(100, [70, 9, 3]), search(100, [9, 41]), search(100, [5, 70])]
    found = chosen(searches, generator())
    assert found == sorted(set(found))
    assert {70, 9, 41, 5} <= {*found}
    assert len(found) == 4 + 5
    assert found == chosen(searches, generator())
    assert {*found} - {70, 9, 41, 5} != {*chosen(searches, generator(1))} - {70, 9, 41, 5}


def test_where_no_trigger_works_yet_the_flip_rate_tells(monkeypatch):
    monkeypatch.setattr(narrowing, "FIRST", 1)
    monkeypatch.setattr(narrowing, "OTHERS", 0)
    eases = narrowing._eases([math.inf, math.nan, math.inf], [0.2, 0.3, 0.6])
    assert chosen([eases], generator()) == [2]
    assert chosen([narrowing._eases([math.inf, 7.0, 9.0], [0.9, 0.5, 0.6])], generator()) == [1]


def test_few_classes_are_all_searched_at_no_cost():
    assert narrowing.passes(500, narrowing.MANY) == 0
    assert narrowing.count(narrowing.MANY) == narrowing.MANY


def test_the_class_of_a_backdoor_is_among_the_first():
    told = []
    found = short_searches(
        planted.model(True),
        CLEAN,
        Inversion(),
        Joint(),
        generator=generator(),
        progress=lambda phase, *_, **__: told.append(phase),
    )
    assert min(found["patch"]) == found["patch"][planted.TARGET]
    assert all(len(eases) == 4 for eases in found.values())
    phases = ["narrow patch", "narrow additive", "narrow smooth", "narrow warp"]
    assert list(dict.fromkeys(told)) == phases


def test_a_scan_searches_what_is_left(monkeypatch):
    monkeypatch.setattr("reprune.detection.gathering.MANY", 3)
    monkeypatch.setattr("reprune.detection.gathering.chosen", lambda *_: [0, 1, planted.TARGET])
    scan = replace(
        Scan(), cleanse=replace(Scan().cleanse, inversion=Inversion(steps=20)), unlearning=None
    )
    scan = replace(scan, joint=Joint(steps=10), margins=None, waves=None)
    evidence = scan.gather(planted.model(True), CLEAN, generator=generator(), progress=silent)
    assert evidence.inverted.classes == (0, 1, 2)
    assert {found.classes for found in evidence.alone.values()} == {(0, 1, 2)}
    assert evidence.told == scan.judge(evidence).trace.notes
    assert evidence.told[0].startswith("of 4 classes 3 were searched for triggers")
    assert "narrow" in evidence.seconds


def test_all_classes_have_no_note():
    masks = torch.zeros(2, 1, 4, 4)
    inverted = Inverted((0, 1), masks, masks.expand(2, 3, 4, 4), (1.0, 1.0), (1.0, 1.0))
    assert Evidence(inverted, of=2).told == Evidence(inverted).told == ()
    assert Evidence(inverted, of=3).noted("one").told[1:] == ("one",)


def test_a_smallest_of_more_classes_says_less():
    sizes = recovered((4.0, 4.2, 0.8, 4.1, 3.9))
    few, many = (added_signs(sizes, 3.0, 0.45, classes)[0].strength for classes in (5, 500))
    assert many == pytest.approx(few * math.sqrt(math.log(10) / math.log(500)))


def test_what_copies_favour_is_searched_though_it_was_left_out():
    counts = [0] * 200
    counts[150] = 7
    found = rivals(recovered((3.0, 2.0, 1.0), (5, 8, 13)), [counts, counts])
    assert found == [5, 8, 13, 150]


def test_the_cost_of_very_many_classes_is_announced():
    scan, whole = Scan(), Scan(joint=None)
    assert scan.passes(500, 1000) < 5 * scan.passes(500, narrowing.MANY)
    assert whole.passes(500, 1000) > 10 * whole.passes(500, narrowing.MANY)
