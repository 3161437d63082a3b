"""How `Auto` teaches, judges what it taught, and falls back."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from tiny_auto import BRIEF, CLEAN, QUICK, bank, generator, rates, same

import planted
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.deadline import Deadline
from reprune.defenses import Auto
from reprune.defenses.auto_repair import Repair
from reprune.defenses.distilling import Lesson
from reprune.defenses.trigger_bank import Bank, Kept, TriggerSearch
from reprune.detection import Joint
from reprune.results import Epoch
from reprune.rnp import Judge


def test_triggers_that_stay_are_taught_with_those_of_all_classes(looked, monkeypatch) -> None:
    monkeypatch.setattr("reprune.defenses.auto_run.Run.accused", property(lambda _: False))
    monkeypatch.setattr("reprune.defenses.auto_run.supporting", lambda _: [])
    auto = replace(BRIEF, left_over=0.0, rates=(0.03,))
    result = auto(planted.model(True), CLEAN, generator=generator())
    first, second, *_ = result.trace.notes
    assert "at a rate of 0.03" in first
    assert "the suspects may be wrong" in second
    assert "distil at 0.03 everywhere" in result.trace.phases
    assert rates(result.model)[1] < 0.5


@pytest.mark.parametrize(
    ("left", "limit", "hardened"),
    [(0.2, None, True), (0.5, None, True), (0.6, None, False), (0.2, 25.0, False)],
)
def test_what_all_classes_taught_is_taken_unless_it_is_clearly_worse(
    monkeypatch, left, limit, hardened
) -> None:
    model, seconds = planted.model(True), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)

    def distil(*_: object, phase: str, **__: object) -> tuple[Classifier, list[Epoch]]:
        nonlocal seconds
        seconds += 10
        return copies[phase], []

    one = Kept(1.0, Lesson(planted.ATTACK.trigger(CLEAN.shape)))
    repair = Repair(
        settings=replace(BRIEF, rates=(0.03, 0.1)),
        distilling=BRIEF.distilling,
        model=model,
        original=model,
        fitting=CLEAN,
        heldout=CLEAN,
        bank=Bank((one,), (one,), (one,)),
        generator=generator(),
        deadline=Deadline(limit),
    )
    phases = ("distil at 0.03", "distil at 0.1", "distil at 0.03 everywhere")
    copies = {phase: model.clone() for phase in phases}
    moved = iter([1.0, 0.4, 0.35, left])
    monkeypatch.setattr("reprune.defenses.auto_repair.distil", distil)
    monkeypatch.setattr(Repair, "moved", lambda *_: next(moved))
    assert repair.teach() is copies[phases[2 if hardened else 0]]
    kept = repair.notes[-1].endswith("the copy before it is kept, in which they move 40%")
    assert kept is not hardened


@pytest.mark.parametrize("left", [0.1, 0.8])
def test_what_was_overlooked_teaches_once_more(looked, evidence, monkeypatch, left) -> None:
    more, model, helps = bank(evidence, "patch"), planted.model(True), left < 0.5
    auto = replace(BRIEF, rates=(0.03,), max_accuracy_drop=1.0)
    before = auto(model, CLEAN, generator=generator())
    seen = iter([1.0, 0.05, 0.9, left, left])  # original, copy, by filters, too, and what follows

    def overlooked(*args, **_) -> dict[str, Bank]:
        assert args[4].joint == auto.scan.joint != auto.search.joint  # sizes are compared
        return {"patch": more}

    monkeypatch.setattr("reprune.defenses.auto_repair.overlooked", overlooked)
    monkeypatch.setattr(Repair, "moved", lambda *_: next(seen))
    monkeypatch.setattr(Repair, "recalibrate", lambda _, repaired, __: repaired)
    result = auto(model, CLEAN, generator=generator())
    assert "distil at 0.03 once more" in result.trace.phases
    looked_at, taught = result.trace.notes[1:3]
    assert f"still lead the copy, and teach, too: {len(more.lessons)} patch from" in looked_at
    assert looked_at.endswith("squared pixels to class 2")
    assert f"moves {left:.0%}, in the copy before 90%" in taught
    assert same(result.model, before.model) is not helps
    assert result.trace.repaired is helps


def _unchanged(defense: Auto, note: str) -> None:
    model = planted.model(True)
    result = defense(model, CLEAN, generator=generator())
    assert same(result.model, model)
    assert not result.trace.repaired
    assert note in " ".join(result.trace.notes)


def test_a_repair_that_costs_too_much_is_given_up(looked) -> None:
    wild = replace(BRIEF, rates=(1000.0,), max_accuracy_drop=0.0)
    _unchanged(wild, "every share of the repair costs more than 0.0 points")


def test_a_repair_that_diverges_ends_with_the_model_before(looked) -> None:
    _unchanged(replace(BRIEF, rates=(1e30,)), "distil at 1e+30 diverged")


def test_without_a_trigger_there_is_nothing_to_repair_with(looked) -> None:
    lame = replace(BRIEF, search=TriggerSearch(joint=Joint(steps=1), min_flip=1.0))
    _unchanged(lame, "no trigger was recovered that works")


def test_a_later_rate_that_diverges_leaves_the_earlier_copy(looked) -> None:
    defense = replace(BRIEF, rates=(1e-4, 1e30), max_accuracy_drop=1.0)
    result = defense(planted.model(True), CLEAN, generator=generator())
    assert "distil at 1e+30 diverged" in " ".join(result.trace.notes)
    assert not same(result.model, planted.model(True))


def test_a_repair_that_leaves_the_triggers_at_work_does_not_suffice(looked) -> None:
    faint = replace(BRIEF, rates=(1e-6,), max_accuracy_drop=1.0)
    result = faint(planted.model(True), CLEAN, generator=generator())
    assert not same(result.model, planted.model(True))
    assert not result.trace.repaired
    assert result.trace.notes[-1].endswith("; that does not suffice")
    whatever = replace(faint, left_over=1.0)
    assert whatever(planted.model(True), CLEAN, generator=generator()).trace.repaired


@pytest.mark.parametrize(
    ("errors", "moves", "taken"),
    [
        ((0.2, 0.1), (0.05, 0.05), True),
        ((0.1, 0.2), (0.05, 0.0), False),
        ((0.1, 0.1), (0.05, 0.05), False),
        ((0.2, 0.1), (0.05, 0.06), False),
        ((0.2, 0.1), (0.0, 0.02), True),  # no more than mistakes
        ((0.2, 0.1), (0.0, 0.03), False),
    ],
)
def test_statistics_are_taken_where_clean_images_are_answered_better(
    monkeypatch, errors, moves, taken
) -> None:
    model = planted.model(True)
    repair = Repair(
        settings=BRIEF,
        distilling=BRIEF.distilling,
        model=model,
        original=model,
        fitting=CLEAN,
        heldout=CLEAN,
        bank=Bank((), ()),
        generator=generator(),
    )
    copy, moved, erred = model.clone().eval(), iter(moves), iter(errors)
    monkeypatch.setattr(Repair, "moved", lambda *_: next(moved))
    monkeypatch.setattr(Repair, "erred", lambda *_: next(erred))
    monkeypatch.setattr(Judge, "mistaken", 0.06)  # of four classes
    found = repair.recalibrate(copy, repair.guard())
    assert (found is not copy) is taken
    assert repair.notes[0].endswith(": they are " + "not " * (not taken) + "taken")


def test_what_the_original_mistakes() -> None:
    wrong = ImageSet(CLEAN.images, (CLEAN.labels + 1) % 4)
    found = [
        Judge(
            planted.model(True),
            data,
            budget=2 * len(data),
            augmentation=Augmentation(),
            generator=generator(),
        ).mistaken
        for data in (CLEAN, wrong)
    ]
    assert found[0] < 0.1
    assert found[1] > 0.9


def test_lessons_end_with_the_time_limit(looked, monkeypatch) -> None:
    """And what was taught by then is judged."""
    auto, seconds = replace(BRIEF, time_limit=100.0, left_over=1.0), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)

    def tick(phase: str, done: int, total: int, /, **figures: float) -> None:
        nonlocal seconds
        seconds += 10 * phase.startswith("distil")

    result = auto(planted.model(True), CLEAN, generator=generator(), progress=tick)
    steps = len(CLEAN) * (1 - auto.holdout) / auto.distilling.batch_size
    assert len(result.trace.phases["distil at 0.03"]) == math.ceil(10 / math.ceil(steps))
    assert result.trace.notes[0] == "the time limit ended the lessons: the copy is judged as it is"
    assert "distilled on" in result.trace.notes[1]
    assert result.trace.repaired
    assert not same(result.model, planted.model(True))
    seconds, wanted = 0.0, replace(auto, left_over=0.0)  # by which a higher rate would follow
    result = wanted(planted.model(True), CLEAN, generator=generator(), progress=tick)
    assert "the time limit of 100 s has passed: the repair ends" in result.trace.notes
    assert not result.trace.repaired


def test_a_time_limit_ends_with_what_there_is() -> None:
    _unchanged(replace(QUICK, time_limit=1e-6), "the time limit of 1e-06 s has passed, before")
