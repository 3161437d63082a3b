"""What a scan does to see more, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from seen import ALIKE, observed, recovered

import planted
from reprune.deadline import Deadline
from reprune.detection import (
    Evidence,
    Inversion,
    Joint,
    Margins,
    MarginSearch,
    NeuralCleanse,
    Scan,
    unlearned_label,
)
from reprune.detection.evidence import agreeing, rivals
from reprune.detection.gathering import HURRIED, NOT_UNLEARNED, Gathering
from reprune.errors import ConvergenceError, TimeLimitError
from reprune.results import Finding, Sign
from reprune.rnp import Unlearning
from reprune.types import Progress, silent


def _looked_again(scan: Scan, evidence: Evidence, progress: Progress = silent) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    data = planted.stripes(60, seed=3)
    return Gathering(scan, planted.model(False), data, generator, progress).again(evidence)


def test_copies_alone_are_looked_at_again_with_filters_in_the_model():
    scan, evidence = Scan(joint=Joint(steps=2)), observed(ALIKE[:4], 2.0, added=ALIKE[:4])
    assert Scan().judge(evidence).finding.verdict == "undecided"
    filters = _looked_again(scan, evidence).alone["filter"]
    assert filters.classes == evidence.joint["smooth"].classes

    def verdict(*sizes: float) -> str:
        alone = {**evidence.alone, "filter": recovered(sizes)}
        return Scan().judge(replace(evidence, alone=alone)).finding.verdict

    assert verdict(20.0, 60.0, 90.0, 80.0) == "undecided"  # the class of the copies
    assert verdict(60.0, 20.0, 90.0, 80.0) == "clean"
    assert verdict(*(math.inf,) * 4) == "clean"
    supported = replace(evidence, alone={"additive": recovered((3.2, 4.2, 4.1, 4.0))})
    assert _looked_again(scan, supported) is supported


def test_where_nothing_is_unusual_filters_are_sought_for_all_classes():
    scan, evidence = Scan(joint=Joint(steps=2)), observed(ALIKE[:4], 0.3, added=ALIKE[:4])
    assert Scan().judge(evidence).finding.verdict == "clean"
    assert _looked_again(scan, evidence).alone["filter"].classes == (0, 1, 2, 3)

    def judged(*sizes: float) -> Finding:
        alone = {**evidence.alone, "filter": recovered(sizes)}
        return Scan().judge(replace(evidence, alone=alone)).finding

    assert judged(90.0, 60.0, 20.0, 80.0).verdict == "clean"
    small = judged(90.0, 60.0, 2.0, 80.0)  # of 16 x 16 pixels
    assert (small.verdict, small.suspect) == ("undecided", 2)
    assert "a filter that changes pictures by 2.0 squared pixels" in small.reasons[0]
    accused = replace(evidence, alone={"additive": recovered((0.2, 4.2, 4.1, 4.0))})
    assert _looked_again(scan, accused) is accused


def test_margins_alone_are_looked_at_again_from_more_starts():
    evidence = observed(ALIKE[:4], 0.1, added=ALIKE[:4])
    margins = Margins((1.0, 9.0, 14.6, 2.0), (1.0, 9.0, 14.6, 10.0))
    evidence = replace(evidence, margins=margins)
    assert Scan().judge(evidence).finding.verdict == "undecided"
    found = _looked_again(Scan(margins=MarginSearch(steps=2)), evidence).margins
    assert all(a >= b for a, b in zip(found.noise, margins.noise, strict=True))
    assert _looked_again(Scan(margins=None), evidence) is evidence


def test_without_time_for_a_second_look_a_doubt_stands_and_nothing_is_called_clean():
    scan, late = Scan(joint=Joint(steps=2)), Deadline(1.0, spent=2.0).watching(silent)
    doubted = observed(ALIKE[:4], 2.0, added=ALIKE[:4])
    found = _looked_again(scan, doubted, late)
    assert scan.judge(found).finding.verdict == "undecided"
    assert scan.suspects(found) == scan.suspects(doubted)
    assert "1 s has passed before the doubt could be looked into" in found.notes[-1]
    with pytest.raises(TimeLimitError):
        _looked_again(scan, observed(ALIKE[:4], 0.3, added=ALIKE[:4]), late)


def test_a_copy_that_cannot_be_unlearned_is_left_out(monkeypatch):
    tried, unlearn_once = [], unlearned_label.unlearn_neurons

    def sometimes(*args, **kwargs):
        tried.append(args)
        if len(tried) == 2:
            raise ConvergenceError("stayed where it was")
        return unlearn_once(*args, **kwargs)

    monkeypatch.setattr(unlearned_label, "unlearn_neurons", sometimes)
    brief = {"joint": Joint(steps=2), "margins": None, "waves": None}
    scan = replace(Scan(), cleanse=NeuralCleanse(inversion=Inversion(steps=2)), **brief)
    data, model = planted.stripes(60, seed=3), planted.model(False)
    generator = torch.Generator().manual_seed(0)
    evidence = scan.gather(model, data, generator=generator, progress=silent)
    assert len(tried) == scan.exposures
    assert 1 <= len(evidence.exposed) <= 2  # those that agree
    assert list(evidence.phases) == ["unlearn 1", "unlearn 3"]
    assert evidence.notes == ("not unlearned: copy 2: stayed where it was",)
    assert all(found.share <= 2 / 3 for found in evidence.favourites.values())
    whole = replace(evidence, notes=())
    assert scan.judge(evidence).finding == scan.judge(whole).finding  # it may well say "clean"


BRIEF = Scan(
    cleanse=NeuralCleanse(inversion=Inversion(steps=60)),
    joint=Joint(steps=3),
    margins=None,
    unlearning=Unlearning(epochs=1, stop_accuracy=-1.0),
)


def _gathered(backdoored: bool, progress: Progress = silent, **options: Deadline) -> Evidence:
    data, generator = planted.stripes(100, seed=3), torch.Generator().manual_seed(0)
    model = planted.model(backdoored)
    return BRIEF.gather(model, data, generator=generator, progress=progress, **options)


def test_without_patience_an_accused_model_is_searched_no_further():
    late = Deadline(1.0, spent=2.0)
    found = _gathered(True, patience=late)
    assert found.notes == (HURRIED,)
    assert not found.alone
    assert not found.exposed
    finding = BRIEF.judge(found).finding
    assert (finding.verdict, finding.target) == ("backdoored", planted.TARGET)
    whole = _gathered(False, patience=late)
    assert whole.exposed
    assert HURRIED not in whole.notes


@pytest.mark.parametrize(
    ("signs", "whole"),
    [
        ([Sign("Neural Cleanse", 1, 0.95, "")], False),
        ([Sign("Neural Cleanse", 1, 0.85, "")], True),
        ([Sign("largest margins", 1, 0.95, "")], True),  # a second look may settle that
        ([Sign("largest margins", 1, 0.95, ""), Sign("waves", 1, 0.5, "")], False),
    ],
)
def test_without_patience_a_doubt_is_enough(monkeypatch, signs, whole):
    monkeypatch.setattr(Scan, "signs", lambda *_: signs)
    found = _gathered(False, patience=Deadline(1.0, spent=2.0))
    assert bool(found.exposed) == whole
    if not whole:
        finding = BRIEF.judge(found).finding
        assert finding.verdict == "undecided"
        assert finding.reasons[0] == HURRIED
        assert "clean is below 0.9" in finding.reasons[1]


@pytest.mark.parametrize("strength", [0.99, 1.0])
def test_an_accused_model_is_not_unlearned(monkeypatch, strength):
    monkeypatch.setattr(Scan, "signs", lambda *_: [Sign("Neural Cleanse", 1, strength, "")])
    found, accused = _gathered(False), strength >= 1
    assert found.notes == ((NOT_UNLEARNED,) if accused else ())
    assert bool(found.exposed) == bool(found.favourites) == (not accused)


def test_what_accuses_stands_where_the_time_is_over():
    def over(phase: str, done: int, total: int, /, **figures: float) -> None:
        if phase == "invert warp":
            raise TimeLimitError("the time has passed")

    found = _gathered(True, over)
    assert found.notes == (
        "the time has passed in the scan: what it saw makes the model suspicious",
    )
    assert set(found.alone) == {"additive", "smooth"}
    assert BRIEF.judge(found).finding.verdict == "backdoored"
    with pytest.raises(TimeLimitError, match="the time has passed"):
        _gathered(False, over)


def test_of_many_classes_some_are_searched_jointly():
    sizes = [float(30 - k) for k in range(30)]
    counts = [0] * 30
    counts[4], counts[7] = 60, 40
    found = rivals(recovered(sizes), [counts])
    assert len(found) == 10
    assert {4, 7, *range(23, 30)} < {*found}
    assert found == sorted(found)
    assert rivals(recovered(sizes[:5]), [counts[:5]]) == list(range(5))
    assert 0 not in rivals(recovered([math.nan, *sizes[1:]]), [counts[::-1]])


def test_a_copy_that_favours_another_class_is_left_out():
    assert agreeing([(9, 1, 0), (2, 3, 4), (8, 1, 1)]) == [0, 2]
    assert agreeing([(0, 9, 0), (9, 0, 0)]) == [0]
    assert agreeing([(0, 9, 0)]) == [0]
