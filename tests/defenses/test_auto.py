"""`Auto` on a planted backdoor: what it repairs, what it leaves alone, how it falls back."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace

import pytest
import torch

import planted
from reprune.attacks import Attack, BadNets, Blend, Goal
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.deadline import NO_END, Deadline
from reprune.defenses import Auto, make_defense
from reprune.defenses.auto import LAST_HALF, LATE
from reprune.defenses.auto_repair import Repair
from reprune.defenses.auto_run import Run
from reprune.defenses.distilling import Distilling
from reprune.defenses.trigger_bank import Bank, Search, TriggerSearch, overlooked, recover_triggers
from reprune.detection import (
    Evidence,
    FamilyName,
    Inversion,
    Joint,
    Led,
    Scan,
    Scanned,
    Wave,
)
from reprune.detection.agreement import supporting
from reprune.detection.gathering import NOT_UNLEARNED
from reprune.errors import ConfigurationError
from reprune.evaluation import ELSEWHERE, evaluate
from reprune.results import Finding, Sign
from reprune.rnp import Judge, Unlearning
from reprune.types import silent

CLEAN = planted.stripes(200, seed=3)
FEW = replace(LAST_HALF, steps=100, batch_size=32)
AUTO = Auto(
    scan=Scan(
        cleanse=replace(Scan().cleanse, inversion=Inversion(steps=80, images=8)),
        unlearning=Unlearning(batch_size=32),
        joint=Joint(steps=60, images=8),
    ),
    search=TriggerSearch(joint=Joint(steps=50)),
    distilling=FEW,
    doubtful=replace(FEW, depth=1.0),
    unsure=FEW,
    rates=(0.03, 0.1),
    max_accuracy_drop=0.1,
)


DULL = replace(
    AUTO.scan,
    cleanse=replace(AUTO.scan.cleanse, index=50.0),
    index=50.0,
    ratio=0.01,
    gap=50.0,
    bent=0.01,
    ahead=50.0,
    pull=50.0,
)
"""Accuses no model."""

QUICK = replace(AUTO, scan=replace(AUTO.scan, unlearning=None))
"""For what does not depend on unlearned copies."""
BRIEF = replace(
    QUICK,
    search=TriggerSearch(
        searches=(Search("patch"), Search("additive")), joint=Joint(steps=30), lessons=1
    ),
    distilling=replace(LAST_HALF, steps=40),
    unsure=replace(LAST_HALF, steps=40),
)
"""For what happens after the scan, whatever is recovered."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def repaired():
    return AUTO(planted.model(True), CLEAN, generator=generator())


def rates(model: Classifier, attack: Attack = planted.ATTACK) -> tuple[float, float]:
    test = planted.stripes(400, seed=9)
    measured = evaluate(model, test, trigger=attack.trigger(test.shape), target=attack.target)
    return measured.ca.share, measured.asr.share


def same(first: Classifier, second: Classifier) -> bool:
    weights = first.state_dict()
    return all(torch.equal(weights[k], v) for k, v in second.state_dict().items())


def test_the_backdoor_is_named_and_goes(repaired) -> None:
    before, after = rates(planted.model(True)), rates(repaired.model)
    assert before[1] > 0.95
    assert after[1] < 0.2
    assert after[0] > before[0] - 0.06
    assert repaired.trace.repaired
    finding = repaired.scanned.finding
    assert (finding.verdict, finding.target) == ("backdoored", planted.TARGET)
    assert set(repaired.triggers) == {planted.TARGET}


def test_the_default_lessons_take_it_out_too() -> None:
    auto = replace(QUICK, distilling=replace(Auto().distilling, steps=100, batch_size=32))
    result = auto(planted.model(True), CLEAN, generator=generator())
    assert rates(result.model)[1] < 0.1
    assert rates(result.model)[0] > rates(planted.model(True))[0] - 0.06


def test_an_all_to_all_backdoor_is_found_and_goes() -> None:
    attack = BadNets(size=3, all_to_all=True, rate=0.3)
    model, test = planted.model(True, attack, epochs=18), planted.stripes(400, seed=9)
    result = QUICK(model, CLEAN, generator=generator())

    def rates(model: Classifier) -> tuple[float, float]:
        measured = evaluate(model, test, trigger=attack.trigger(test.shape), target=Goal(None))
        return measured.ca.share, measured.asr.share

    assert rates(model)[1] > 0.95
    assert rates(result.model)[1] < 0.2
    assert rates(result.model)[0] > rates(model)[0] - 0.06
    finding = result.scanned.finding
    assert (finding.verdict, finding.target, finding.suspect) == ("backdoored", None, None)
    assert "leads the images of 4 classes to 4 other ones" in finding.reasons[0]
    assert set(result.triggers) == {ELSEWHERE}


def test_every_step_is_in_the_trace(repaired) -> None:
    trace = repaired.trace
    assert set(trace.phases) == {"distil at 0.03"}
    searches = {"invert", "margins", "waves", "recover"}
    assert searches | {"distil", "step back"} <= set(trace.seconds)
    assert trace.notes[0] == NOT_UNLEARNED
    assert "triggers at a rate of 0.03: " in trace.notes[1]
    assert "others move" in trace.notes[1]
    assert "of the way from the original" in trace.notes[-1]


def test_of_a_doubtful_model_the_copies_are_in_the_trace_too() -> None:
    result = replace(BRIEF, scan=DULL)(planted.model(True), CLEAN, generator=generator())
    assert result.scanned.finding.verdict == "undecided"
    assert {"unlearn 1", "unlearn 3", "distil at 0.03"} <= set(result.trace.phases)
    assert {"unlearn", "invert jointly"} <= set(result.trace.seconds)


@pytest.fixture
def looked(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scan sees what one saw."""
    monkeypatch.setattr(Scan, "gather", lambda *_, **__: evidence)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    scan = replace(AUTO.scan, unlearning=None, joint=Joint(steps=40, images=8))
    return scan.gather(planted.model(True), CLEAN, generator=generator(), progress=silent)


def bank(
    evidence: Evidence, *more: FamilyName, support: str = "", patience: Deadline = NO_END
) -> Bank:
    return recover_triggers(
        planted.model(True),
        evidence,
        CLEAN,
        [planted.TARGET],
        [],
        TriggerSearch(searches=tuple(map(Search, ("additive", *more))), lessons=1, min_flip=0.0),
        accused=False,
        support=[Sign(support, planted.TARGET, 0.5, "")] if support else [],
        generator=generator(),
        progress=silent,
        patience=patience,
    )


@pytest.mark.parametrize("sure", [True, False])
def test_where_suspects_are_not_sure_there_are_pictures_of_other_classes(evidence, sure) -> None:
    found = bank(replace(evidence, waves=None), support="largest margins" if sure else "")
    labels = {one.label for one in found.others}
    assert labels == (set() if sure else {0, 1, 2, 3} - {planted.TARGET})
    assert found.taught() == [one.lesson for one in found.lessons]
    taught = found.taught(everywhere=True)
    suspects = sum(lesson is found.lessons[0].lesson for lesson in taught)
    assert suspects == max(1, len(found.others))  # as often as all the others
    assert len(taught) == suspects + len(found.others)


@pytest.mark.parametrize(
    ("verdict", "signs", "wanted"),
    [
        ("backdoored", {"warps": 1.2, "joint inversion, smooth": 0.99}, AUTO.distilling),
        ("undecided", {"warps": 0.3, "joint inversion, smooth": 0.99}, AUTO.doubtful),
        ("undecided", {"warps": 0.5, "waves": 0.4, "agreement": 0.95}, AUTO.distilling),
        ("undecided", {"warps": 0.95}, AUTO.thorough),  # nothing supports it
    ],
)
def test_the_verdict_decides_how_the_lessons_are_taught(verdict, signs, wanted) -> None:
    run = Run(AUTO, planted.model(True), CLEAN, CLEAN, CLEAN, generator(), silent)
    seen = tuple(Sign(name, 0, strength, "") for name, strength in signs.items())
    run.scanned = Scanned(Finding(verdict, signs=seen))
    assert run.distilling == wanted


@pytest.mark.parametrize(
    ("support", "lessons"), [("", 2), ("largest margins", 1), ("warps", 2), ("added pictures", 2)]
)
def test_what_supports_the_suspect_counts_whatever_it_needs_and_all_where_nothing_does(
    evidence, support, lessons
) -> None:
    added, smooth = evidence.alone["additive"], evidence.alone["smooth"]
    alone = {  # what innocent classes need
        "additive": replace(added, sizes=(1e-3,) * len(added.sizes)),
        "smooth": replace(smooth, sizes=(1e3,) * len(smooth.sizes)),
    }
    found = bank(replace(evidence, alone=alone, waves=None), "smooth", support=support)
    assert (len(found.lessons), len(found.judges)) == (lessons, 1)
    none = bank(replace(evidence, alone={"additive": alone["additive"]}, waves=None))
    assert not none.lessons


@pytest.mark.parametrize(
    ("chances", "kept"),
    [
        ([0.9, 0.99, 0.6], [1, 0]),  # one teaches, one judges
        ([0.1, 0.1, 0.3], []),  # another class is pulled as hard
    ],
)
def test_waves_that_lead_to_the_suspect_teach_and_judge(evidence, chances, kept) -> None:
    waves = [Wave(i, 0) for i in range(3)]
    table = torch.full((3, 4), 0.3)
    table[:, planted.TARGET] = torch.tensor(chances)
    led = Led(tuple(waves), table, 0.2)
    with_waves = bank(replace(evidence, waves=led), support="largest margins")
    without = bank(replace(evidence, waves=None), support="largest margins")
    added = [*with_waves.lessons[len(without.lessons) :], *with_waves.judges[-1:]]
    if not kept:
        assert len(with_waves.lessons) == len(without.lessons)
        return
    image = torch.full((1, 3, planted.SIDE, planted.SIDE), 0.5)
    for one, wave in zip(added, kept, strict=True):
        strongest = waves[wave].stamp((3, planted.SIDE, planted.SIDE), 0.3)
        assert torch.allclose(one.strongest(image), strongest(image), atol=1e-6)


def test_suspects_are_sure_where_the_model_alone_names_them_too() -> None:
    joint = Sign("joint inversion, smooth", 2, 0.99, "")
    patches, faint, other = (
        Sign("Neural Cleanse", k, s, "") for k, s in ((2, 0.4), (2, 0.05), (1, 0.4))
    )
    assert supporting([joint, patches, other]) == [patches]
    assert not supporting([joint, faint, other, Sign("joint inversion, additive", 2, 0.9, "")])
    assert not supporting([replace(patches, strength=0.95), replace(joint, strength=0.9)])
    assert not supporting([])


def test_what_begins_alike_is_begun_once(evidence, monkeypatch) -> None:
    """And each ends as if it were alone; what was begun serves again."""
    planned = [
        replace(BRIEF, rates=(0.01,)),
        replace(BRIEF, distilling=replace(LAST_HALF, steps=20, depth=1.0), rounds=2),
        replace(BRIEF, rates=(1e30,)),
        replace(BRIEF, search=replace(BRIEF.search, searches=(Search("patch"),))),
        replace(BRIEF, search=replace(BRIEF.search, min_flip=1.0, joint=Joint(steps=1))),
    ]
    assert {*LATE} <= {f.name for f in fields(Auto)}
    model, looked = planted.model(True), []
    monkeypatch.setattr(Scan, "gather", lambda *_, **__: looked.append(1) or evidence)
    draws = generator()
    begun = BRIEF.begin(model, CLEAN, generator=draws)
    assert torch.equal(draws.get_state(), generator().get_state())
    together = [auto.finish(begun) for auto in planned]
    assert len(looked) == 2  # the second round looks at another model
    for auto, shared in zip(planned, together, strict=True):
        alone = auto(model, CLEAN, generator=generator())
        assert same(shared.model, alone.model)
        assert shared.trace.notes == alone.trace.notes
        assert shared.trace.phases == alone.trace.phases
        assert shared.trace.seconds.keys() == alone.trace.seconds.keys()
    with pytest.raises(ConfigurationError, match="rates must be positive"):
        replace(BRIEF, rates=()).finish(begun)


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


WARPS = TriggerSearch(searches=(Search("warp"),), joint=Joint(steps=60), min_flip=0.0)
"""What teaches hardly anything of a patch."""
FILTERS = replace(WARPS, searches=(*WARPS.searches, Search("filter", joint=True)))


def _overlooked(evidence: Evidence, suspect: int, settings: TriggerSearch, backdoored=True) -> Bank:
    return overlooked(
        planted.model(backdoored),
        evidence,
        CLEAN,
        [suspect],
        settings,
        generator=generator(),
        progress=silent,
    )


def test_small_filters_show_what_a_repair_has_overlooked(evidence, monkeypatch) -> None:
    bound = "reprune.defenses.trigger_bank.natural_filter"
    monkeypatch.setattr(bound, lambda _: math.inf)
    found = _overlooked(evidence, planted.TARGET, FILTERS)
    assert {one.label for one in (*found.lessons, *found.judges)} == {planted.TARGET}
    assert (len(found.lessons), len(found.judges)) == (FILTERS.lessons, 1)
    assert all(one.lesson.strongest > 1 for one in found.lessons)
    nothing = Bank((), ())
    assert _overlooked(evidence, planted.TARGET, FILTERS, backdoored=False) == nothing
    assert _overlooked(evidence, planted.TARGET, WARPS) == nothing  # filters were not asked for
    assert _overlooked(evidence, ELSEWHERE, FILTERS) == nothing
    monkeypatch.setattr(bound, lambda _: 1.0)
    assert _overlooked(evidence, planted.TARGET, FILTERS) == nothing  # no smaller than natural


@pytest.mark.parametrize("left", [0.1, 0.8])
def test_what_was_overlooked_teaches_once_more(looked, evidence, monkeypatch, left) -> None:
    more, model, helps = bank(evidence, "patch"), planted.model(True), left < 0.5
    auto = replace(BRIEF, rates=(0.03,), max_accuracy_drop=1.0)
    before = auto(model, CLEAN, generator=generator())
    seen = iter([1.0, 0.05, 0.9, left, left])  # original, copy, by filters, too, and what follows
    monkeypatch.setattr("reprune.defenses.auto_repair.overlooked", lambda *_, **__: more)
    monkeypatch.setattr(Repair, "moved", lambda *_: next(seen))
    monkeypatch.setattr(Repair, "recalibrate", lambda _, repaired, __: repaired)
    result = auto(model, CLEAN, generator=generator())
    assert "distil at 0.03 with filters" in result.trace.phases
    assert "squared pixels still leads the copy to class 2" in result.trace.notes[1]
    assert f"moves {left:.0%}, in the copy before 90%" in result.trace.notes[1]
    assert same(result.model, before.model) is not helps
    assert result.trace.repaired is helps


def test_a_clean_model_comes_back_bit_by_bit() -> None:
    model = planted.model(False)
    result = AUTO(model, CLEAN, generator=generator())
    assert result.scanned.finding.verdict == "clean"
    assert same(result.model, model)
    assert result.trace.notes == ("judged clean: the model is returned as it came",)
    assert result.trace.repaired


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


def test_a_time_limit_ends_with_what_there_is() -> None:
    _unchanged(replace(QUICK, time_limit=1e-6), "the time limit of 1e-06 s has passed, before")


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


def test_without_patience_one_kind_of_triggers_is_recovered(evidence) -> None:
    found = bank(evidence, "smooth", patience=Deadline(1.0, spent=2.0))
    whole, alone = bank(evidence, "smooth"), bank(evidence)
    assert len(found.lessons) < len(whole.lessons)
    assert [one.hurried for one in (found, whole, alone)] == [True, False, False]
    assert [one.size for one in found.lessons] == [one.size for one in alone.lessons]


def test_what_lies_between_begin_and_finish_is_not_counted(looked, monkeypatch) -> None:
    auto, now = replace(BRIEF, time_limit=1000.0, left_over=1.0), time.monotonic
    begun = auto.begin(planted.model(True), CLEAN, generator=generator())
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1e6)
    assert auto.finish(begun).trace.repaired
    begun.spent = 2000.0
    assert "the time limit of 1000 s has passed" in auto.finish(begun).trace.notes[0]


def test_unlearning_that_diverges_leaves_the_triggers() -> None:
    scan = replace(DULL, unlearning=Unlearning(batch_size=32, lr=1e30, retries=0))
    result = replace(BRIEF, scan=scan)(planted.model(True), CLEAN, generator=generator())
    assert "copies could not be unlearned" in result.trace.notes[0]
    assert result.scanned.finding.suspect == planted.TARGET
    assert rates(result.model)[1] < 0.5


BLEND = Blend(target=0)


@pytest.fixture(scope="module")
def twice() -> Classifier:
    """A model with two backdoors."""
    model = planted.model(True, epochs=10, second=BLEND)
    assert min(rates(model)[1], rates(model, BLEND)[1]) > 0.95
    return model


def test_two_backdoors_are_accused_and_repaired_at_once(twice) -> None:
    result = replace(QUICK, suspects=1)(twice, CLEAN, generator=generator())
    assert set(result.scanned.finding.targets) == {planted.TARGET, BLEND.target}
    assert max(rates(result.model)[1], rates(result.model, BLEND)[1]) < 0.2
    assert rates(result.model)[0] > rates(twice)[0] - 0.06


def test_a_second_round_finds_what_the_first_one_hid(twice, monkeypatch) -> None:
    monkeypatch.setattr("reprune.detection.scan.several_signs", lambda *_: [])
    monkeypatch.setattr("reprune.defenses.auto.ACCUSED", 1)
    auto = replace(QUICK, suspects=1, rounds=2)
    result = auto(twice, CLEAN, generator=generator())
    assert max(rates(result.model)[1], rates(result.model, BLEND)[1]) < 0.2
    assert rates(result.model)[0] > rates(twice)[0] - 0.06
    assert result.scanned.finding.target == planted.TARGET
    assert "leads to class 0" in " ".join(n for n in result.trace.notes if n.startswith("round 2"))
    assert {"distil at 0.03", "round 2, distil at 0.03"} <= set(result.trace.phases)
    assert "2 classes are accused: the first 1 are repaired" in result.trace.notes


def test_a_second_round_repairs_nothing_on_a_doubt(evidence, monkeypatch) -> None:
    doubted = replace(BRIEF.scan, joint=None, waves=None).gather(
        planted.model(False), CLEAN, generator=generator(), progress=silent
    )
    seen = iter((evidence, replace(doubted, notes=("of copies there are none",))))
    monkeypatch.setattr(Scan, "gather", lambda *_, **__: next(seen))
    result = replace(BRIEF, rounds=3)(planted.model(True), CLEAN, generator=generator())
    assert result.trace.notes[-1] == "round 2: not accused: the model is returned as it came"
    assert not any(
        "round 2, distil" in phase or "round 3" in phase for phase in result.trace.phases
    )


@pytest.mark.parametrize(("accused", "most"), [(0, 2), (1, 2), (3, 3), (19, 10)])
def test_of_many_accused_classes_some_are_repaired(accused: int, most: int) -> None:
    assert Auto().most_suspects(accused) == most
    assert replace(AUTO, suspects=12).most_suspects(accused) == 12


def test_efforts_differ_in_what_they_cost() -> None:
    costs = [make_defense("auto", effort=e).passes(500, 10) for e in ("low", "normal", "high")]
    assert costs[0] < costs[1] < costs[2]
    assert make_defense("auto") == Auto()
    assert make_defense("auto", time_limit=60.0).time_limit == 60.0
    assert make_defense("auto", max_accuracy_drop=0.01).max_accuracy_drop == 0.01
    with pytest.raises(ConfigurationError, match="effort must be low, normal or high"):
        Auto.effort("huge")
    with pytest.raises(ConfigurationError, match="for the method auto, not for rnp"):
        make_defense("rnp", effort="low")
    with pytest.raises(ConfigurationError, match="effort is for the method auto, not for auto:low"):
        make_defense("auto:low", effort="high")


def test_an_effort_says_what_it_leaves_out() -> None:
    (low,), (normal,), high = (Auto.effort(e).skipped for e in ("low", "normal", "high"))
    assert low.startswith("left out at this effort: 4 of 5 unlearned copies (of models that no ")
    assert "searches for triggers: filter (joint)" in low
    assert "filters in what was taught" in low
    assert "teaching once more at a higher rate" in low
    assert "2 of 5 unlearned copies" in normal
    assert "3 of 6 triggers of each kind" in normal
    assert "16 of 32 images of each search" in normal
    assert "5 of 5 unlearned copies" in replace(Auto(), scan=Scan(unlearning=None)).skipped[0]
    assert normal.endswith("another scan of the repaired model")
    assert not high


def test_efforts_and_the_former_default_have_names() -> None:
    assert make_defense("auto:low") == Auto.effort("low")
    assert make_defense("auto:high", time_limit=60.0) == replace(
        Auto.effort("high"), time_limit=60.0
    )
    late = make_defense("auto:late")
    assert (late.distilling.depth, late.distilling.repelled) == (0.5, 0.0)
    assert late.scan == Auto().scan
    assert late.search == Auto().search


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": TriggerSearch(searches=())}, "there has to be a search"),
        (
            {"search": TriggerSearch(searches=(Search("shadow"),))},
            "families must be some of patch, additive",
        ),
        ({"suspects": 0}, "suspects must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rates": ()}, "rates must be positive"),
        ({"rates": (0.1, 0.0)}, "rates must be positive"),
        ({"holdout": 1.0}, "holdout"),
        ({"left_over": 2.0}, "left_over must lie"),
        ({"search": TriggerSearch(strongest=0.5)}, "strongest must be at least 1"),
        ({"search": TriggerSearch(strongest=math.nan)}, "strongest must be at least 1"),
        ({"search": TriggerSearch(everywhere=0.5)}, "everywhere must be at least 1"),
        ({"unsure": Distilling(steps=0)}, "steps must be positive"),
        ({"time_limit": 0.0}, "time_limit must be positive"),
        ({"scan": Scan(exposures=0)}, "exposures must be at least 1"),
        ({"scan": Scan(clear=1.5)}, r"clear in \(0, 1\], got 0.45 and 1.5"),
        ({"scan": Scan(doubt=0.0)}, "doubt must be greater than 0"),
        ({"scan": Scan(ahead=1.0)}, "ahead must be greater than 1"),
    ],
)
def test_settings_out_of_range_are_refused(change, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(AUTO, **change).check()
