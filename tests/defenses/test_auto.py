"""`Auto` on a planted backdoor: what it names, repairs and leaves alone."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace

import pytest
import torch
from tiny_auto import AUTO, BRIEF, CLEAN, DULL, QUICK, generator, rates, same

import planted
from reprune.attacks import BadNets, Blend, Goal
from reprune.classifier import Classifier
from reprune.defenses import Auto, make_defense
from reprune.defenses.auto import LAST_HALF, LATE
from reprune.defenses.auto_run import Run
from reprune.defenses.distilling import Distilling
from reprune.defenses.trigger_bank import Search, TriggerSearch
from reprune.detection import Joint, Scan, Scanned
from reprune.detection.gathering import NOT_UNLEARNED
from reprune.errors import ConfigurationError
from reprune.evaluation import ELSEWHERE, evaluate
from reprune.results import Finding, Sign
from reprune.rnp import Unlearning
from reprune.types import silent


@pytest.fixture(scope="module")
def repaired():
    return AUTO(planted.model(True), CLEAN, generator=generator())


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


def test_a_clean_model_comes_back_bit_by_bit() -> None:
    model = planted.model(False)
    result = AUTO(model, CLEAN, generator=generator())
    assert result.scanned.finding.verdict == "clean"
    assert same(result.model, model)
    assert result.trace.notes == ("judged clean: the model is returned as it came",)
    assert result.trace.repaired


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
    assert "triggers in what was taught" in low
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
