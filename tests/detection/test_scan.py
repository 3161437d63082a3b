"""`NeuralCleanse` and `Scan`: the verdict on trigger sizes, and whole scans of planted models."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

import planted
from reprune.attacks import Stamp
from reprune.data import ImageSet
from reprune.deadline import Deadline
from reprune.detection import (
    Evidence,
    Favourite,
    Inversion,
    Inverted,
    Joint,
    Margins,
    MarginSearch,
    NeuralCleanse,
    Recovered,
    Scan,
    anomaly_indices,
    unlearned_label,
)
from reprune.detection.calibration import clean_strengths
from reprune.detection.evidence import (
    NATURAL_ADDED,
    NATURAL_FILTER,
    agreeing,
    natural_added,
    natural_filter,
    rivals,
)
from reprune.detection.gathering import HURRIED, NOT_UNLEARNED, Gathering
from reprune.detection.signs import (
    added_signs,
    crowded,
    filter_sign,
    one_of_each,
    outlying,
    several_signs,
    smooth_sign,
)
from reprune.errors import ConvergenceError, DataError, ModelError, TimeLimitError
from reprune.evaluation import ELSEWHERE
from reprune.results import BackdoorLabel, Finding, Sign, from_json, to_json
from reprune.rnp import Unlearning
from reprune.types import Progress, silent

PIXELS = 1024
NONE = math.inf
NAN = math.nan


def judge(
    sizes: Sequence[float],
    label: BackdoorLabel | None = None,
    detector: NeuralCleanse | None = None,
) -> Finding:
    count = len(sizes)
    inverted = Inverted(
        tuple(range(count)),
        torch.zeros(count, 1, 32, 32),
        torch.zeros(count, 3, 32, 32),
        tuple(sizes),
        tuple(0.97 if math.isfinite(size) else 0.0 for size in sizes),
    )
    return (detector or NeuralCleanse()).judge(inverted, label)


def unlearned(label: int | None) -> BackdoorLabel:
    return BackdoorLabel(label, (1, 9), 0.9, 0.8, f"models answer class {label}")


# --- verdicts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "verdict", "target"),
    [
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 50], "clean", None),
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 26], "clean", None),  # 52 %: outlying, but large
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 20], "undecided", None),  # between 35 % and 50 %
        ([50, 52, 48, 51, 49, 50, 53, 47, 50, 16], "backdoored", 9),
        ([4, 52, 48, 51, 49, 50, 53, 5, 50, 50], "backdoored", 0),  # two: the smaller is named
        ([1, 60, 20, 200, 5, 400, 100, 10, 700, 30], "undecided", None),  # small, but all differ
        ([NONE, 6, NONE, NONE], "backdoored", 1),  # a shortcut where no other class has any
        ([NONE, NONE, NONE, 600], "undecided", None),
        ([NONE, NONE, 600, 600], "undecided", None),  # half of the searches failed
        ([NONE] * 4, "undecided", None),
        ([0, 50, 50, 50, 50], "undecided", None),  # reached without a trigger
        ([0, 50, 50, 50, 5], "backdoored", 4),
        ([0, 50, 50, 50], "undecided", None),  # three classes are left
        ([950, 50, 51, 49, 50], "undecided", None),  # one of five is saturated
        ([950, *[50, 51, 49] * 3], "clean", None),  # one of ten is
        ([950, 960, 950, 600, 600], "undecided", None),
    ],
)
def test_verdicts(sizes, verdict, target):
    finding = judge(sizes)
    assert (finding.verdict, finding.target) == (verdict, target)
    assert [score.size for score in finding.scores] == [
        size if math.isfinite(size) else None for size in sizes
    ]
    assert [score.label for score in finding.scores] == list(range(len(sizes)))
    assert from_json(Finding, to_json(finding)) == finding


def test_reasons_hold_the_figures():
    assert judge([50, 50, 50, 10]).reasons == (
        "class 3 needs the smallest trigger: 10.0 pixels, 20% of the median 50.0 over the classes "
        "(anomaly index 8.0)",
    )
    assert judge([50, 50, 50, 50]).reasons[0].startswith("no class stands out: class 0 needs")
    assert "needed: index 3 and at most 35%" in judge([50, 50, 50, 20]).reasons[0]
    assert judge([NONE, NONE, NONE, 600]).reasons == (
        "a trigger was recovered for only 1 of 4 classes",
    )


def test_the_backdoor_label_is_evidence_that_agrees_or_not_and_decides_nothing():
    for label in (None, unlearned(None), unlearned(3), unlearned(0)):
        assert judge([50, 50, 50, 10], label).verdict == "backdoored"
        assert judge([50, 50, 50, 50], label).verdict == "clean"
        assert judge([50, 50, 50, 20], label).verdict == "undecided"
    sizes = [50, 50, 50, 10]
    assert judge(sizes, unlearned(3)).reasons[1] == "unlearning agrees: models answer class 3"
    assert judge(sizes, unlearned(0)).reasons[1] == (
        "unlearning points to another class: models answer class 0"
    )
    assert judge(sizes, unlearned(None)).reasons[1] == "unlearning: models answer class None"
    assert judge([50, 50, 50, 50], unlearned(0)).reasons[1].startswith("unlearning: models")


@pytest.mark.parametrize("lost", [{0}, {2}, {1, 3}, {0, 1, 2, 3, 4, 5}])
@pytest.mark.parametrize("size", [1.0, 50.0, NONE])
def test_nan_is_never_clean(lost, size):
    sizes = [NAN if k in lost else 50.0 for k in range(6)]
    if 5 not in lost:
        sizes[5] = size
    finding = judge(sizes)
    assert finding.verdict == ("backdoored" if sizes[5] == 1 else "undecided")
    said = [reason for reason in finding.reasons if "NaN" in reason]
    assert said == [
        "the outputs became NaN or infinite in the search for class "
        + ", ".join(map(str, sorted(lost)))
    ]
    assert all(math.isfinite(score.index) for score in finding.scores)


# --- anomaly index -------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1000), min_size=2, max_size=40))
def test_the_index_counts_robust_deviations_of_the_log_sizes(sizes):
    logs = torch.tensor(sizes, dtype=torch.float64).log().numpy()
    middle = torch.tensor(logs).quantile(0.5).item()
    deviation = max(median_abs_deviation(logs, scale="normal"), 0.2)
    expected = (middle - logs) / deviation
    assert anomaly_indices(sizes, PIXELS) == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)


def test_the_index_of_infinite_and_empty_triggers_is_finite():
    assert anomaly_indices([NONE, 10, 20], PIXELS) == anomaly_indices([PIXELS, 10, 20], PIXELS)
    assert all(map(math.isfinite, anomaly_indices([0, 10, 20], PIXELS)))


def test_the_floor_on_the_deviation():
    assert anomaly_indices([10, 10, 10, 5], PIXELS)[3] == pytest.approx(math.log(2) / 0.2)
    assert anomaly_indices([10, 10, 10, 5], PIXELS, 0.5)[3] == pytest.approx(math.log(2) / 0.5)


# --- the whole scan ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return planted.stripes(120, seed=55)


def test_a_planted_backdoor_is_found(data, generator):
    scan = Scan(unlearning=None)
    scanned = scan(planted.model(backdoored=True), data, generator=generator)
    assert (scanned.finding.verdict, scanned.finding.target) == ("backdoored", planted.TARGET)
    assert len(scanned.finding.scores) == len(scanned.inverted.classes) == 4


def test_a_clean_model_is_not_accused(data, generator):
    scan = Scan(unlearning=None)
    scanned = scan(planted.model(backdoored=False), data, generator=generator)
    assert scanned.finding.verdict != "backdoored"
    assert scanned.finding.target is None


def test_the_model_is_untouched(data, generator, unchanged):
    model = copy.deepcopy(planted.model(backdoored=True)).train()
    model.network[0].weight.requires_grad_(False)
    with unchanged(model):
        Scan(cleanse=NeuralCleanse(inversion=Inversion(steps=3)), unlearning=None)(
            model, data, generator=generator
        )


def test_unfit_data_and_models_are_refused(data, generator):
    model = planted.model(backdoored=True)
    with pytest.raises(DataError, match="too few images: got 20, at least 50"):
        Scan()(model, data.subset(range(20)), generator=generator)
    shuffled = data.labels[torch.randperm(len(data), generator=generator)]
    with pytest.raises(ModelError, match="at chance on this data"):
        Scan()(model, ImageSet(data.images, shuffled), generator=generator)


@pytest.mark.parametrize("sizes", [[50, 5], [50, 50], [50, 50, 5], [50, 50, 50]])
def test_few_classes_stay_undecided(sizes):
    finding = judge(sizes)
    assert finding.verdict == "undecided"
    assert finding.reasons[0] == f"trigger sizes of only {len(sizes)} classes cannot be compared"


def test_states_say_how_each_search_ended():
    finding = judge([0, 50, 1000, NONE, NAN, 52, 48])
    assert [score.state for score in finding.scores] == [
        "empty",
        "found",
        "saturated",
        "never flips",
        "broken",
        "found",
        "found",
    ]
    assert finding.scores[0].index == 0
    assert finding.reasons == (
        "a trigger was recovered for only 3 of 7 classes",
        "the outputs became NaN or infinite in the search for class 4",
        "images reach class 0 without any trigger",
    )


def test_nothing_but_empty_triggers_is_undecided():
    assert judge([0] * 5).verdict == "undecided"
    assert judge([0] * 5).reasons == ("images reach class 0, 1, 2, 3, 4 without any trigger",)


# --- the published rule --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "verdict", "target"),
    [
        ([50, 52, 48, 51, 49, 50, 53, 49, 50, 50], "clean", None),
        ([50, 52, 48, 51, 49, 50, 53, 49, 50, 26], "backdoored", 9),  # index far above 2
        ([50, 52, 48, 51, 49, 50, 53, 49, 50, 90], "clean", None),  # an outlier on the large side
        ([NONE, NONE, NONE, 600], "undecided", None),
        ([NAN, 52, 48, 51, 49], "undecided", None),
    ],
)
def test_the_published_rule(sizes, verdict, target):
    finding = judge(sizes, detector=NeuralCleanse.paper())
    assert (finding.verdict, finding.target) == (verdict, target)


@given(st.lists(st.floats(1, 1000), min_size=4, max_size=40))
def test_the_published_index_counts_robust_deviations_of_the_sizes(sizes):
    values = torch.tensor(sizes, dtype=torch.float64)
    deviation = max(median_abs_deviation(values.numpy(), scale="normal"), 1e-3)
    expected = (values.quantile(0.5) - values) / deviation
    indices = anomaly_indices(sizes, PIXELS, 1e-3, log=False)
    assert indices == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert [score.index for score in judge(sizes, detector=NeuralCleanse.paper()).scores] == (
        pytest.approx(list(indices))
    )


# --- the label beside it -------------------------------------------------------------------


def test_a_label_that_is_there_already_costs_nothing_and_changes_no_size(data, generator):
    quick = Scan(
        cleanse=NeuralCleanse(inversion=Inversion(steps=3)),
        unlearning=Unlearning(epochs=1, stop_accuracy=-1.0),
        exposures=1,
        joint=None,
    )
    model = planted.model(backdoored=False)
    told: list[str] = []
    whole = quick(model, data, generator=generator, progress=lambda name, *_: told.append(name))
    assert {*told} == {"unlearn", "invert", "margins", "waves"} == {*whole.trace.seconds}
    assert whole.trace.label is not None
    assert list(whole.trace.phases) == ["unlearn"]
    told.clear()
    given = quick.given(whole.trace.label)(
        model,
        data,
        generator=generator.manual_seed(0),
        progress=lambda name, *_: told.append(name),
    )
    assert {*told} == {"invert", "margins", "waves"}
    assert given.finding == whole.finding
    assert quick.given(None).unlearning is None


# --- the search in the unlearned copies, too ------------------------------------------------


def _recovered(sizes: Sequence[float]) -> Recovered:
    nothing = Stamp(torch.ones(3, 16, 16), torch.zeros(3, 16, 16))
    count = len(sizes)
    return Recovered(tuple(range(count)), (nothing,) * count, tuple(sizes))


def _evidence(
    patches: Sequence[float],
    strength: float,
    added: Sequence[float] = (4.0, 4.2, 4.1, 3.9, 4.0),
    joint_size: float = 2.0,
    ahead: float = 1.1,
) -> Evidence:
    count = len(patches)
    masks = torch.tensor(patches).view(-1, 1, 1, 1).expand(count, 1, 16, 16) / 256
    inverted = Inverted(
        tuple(range(count)), masks, torch.zeros(count, 3, 16, 16), tuple(patches), (0.99,) * count
    )
    joint = _recovered((joint_size, *(9.0,) * (count - 1)))
    return Evidence(
        inverted,
        alone={"additive": _recovered(added)},
        joint={"smooth": joint},
        margins=Margins((1.0, 9.0, 10.0 * ahead, 2.0, 10.0), (1.0, 9.0, 11.0 * ahead, 2.0, 11.0))
        if count == 5
        else None,
        favourites={"smooth": Favourite(0, joint_size, strength * Scan().doubt, 1.0)},
    )


ALIKE, ODD = (40.0, 42.0, 39.0, 41.0, 43.0), (40.0, 42.0, 3.0, 41.0, 43.0)
FEW_2 = (4.0, 4.2, 0.8, 4.1, 4.0, 0.9, 4.0)
SMALL_3 = (4.0, 4.2, 4.1, 0.9, 4.0)


@pytest.mark.parametrize(
    ("sizes", "joint", "added", "ahead", "verdict", "target", "suspects"),
    [
        (ALIKE, 0.1, ALIKE, 1.1, "clean", None, []),
        (ALIKE, 0.9, ALIKE, 1.1, "clean", None, []),
        (ALIKE, 1.05, ALIKE, 1.1, "undecided", None, [0]),
        (ALIKE, 9.0, ALIKE, 1.1, "undecided", None, [0]),  # unlearned copies never accuse
        ((40.0, 42.0, 15.5, 41.0, 43.0), 0.1, ALIKE, 1.1, "undecided", None, [2]),
        ((40.0, 42.0, 18.0, 41.0, 43.0), 0.1, ALIKE, 1.1, "clean", None, []),
        (ODD, 0.1, ALIKE, 1.1, "backdoored", 2, [2]),
        (ODD, 1.2, ALIKE, 1.1, "backdoored", 2, [2]),  # far behind
        (ODD, 0.9, ALIKE, 1.1, "backdoored", 2, [2]),
        (ALIKE, 0.1, SMALL_3, 1.1, "backdoored", 3, [3]),
        (ALIKE, 3.0, SMALL_3, 1.1, "backdoored", 3, [3]),
        (ALIKE, 3.0, (4.0, 4.2, 4.1, 1.6, 4.0), 1.1, "backdoored", 3, [3, 0]),
        ((40.0, 42.0, 3.0, 41.0, 43.0, 3.5, 40.0), 0.1, FEW_2, 1.1, "backdoored", 2, [2, 5]),
        (ALIKE, 0.1, (4.0, 4.2, 4.1, 3.2, 4.0), 1.1, "clean", None, []),
        (ALIKE, 0.1, (4.0, 4.2, 4.1, 0.9, math.inf), 1.1, "backdoored", 3, [3]),
        (ALIKE, 0.1, (4.0, 4.2, math.inf, 0.9, math.inf), 1.1, "clean", None, []),  # too few
        (ALIKE, 0.1, ALIKE, 1.46, "undecided", None, [2]),
        (ALIKE, 0.1, ALIKE, 1.6, "backdoored", 2, [2]),
        (ALIKE, 1.2, ALIKE, 1.6, "backdoored", 2, [2, 0]),
        (ALIKE, 0.1, ALIKE, math.nan, "undecided", None, [0]),  # a broken search
    ],
)
def test_each_search_has_its_say(sizes, joint, added, ahead, verdict, target, suspects):
    scan, evidence = Scan(), _evidence(sizes, joint, added, ahead=ahead)
    finding = scan.judge(evidence).finding
    assert (finding.verdict, finding.target) == (verdict, target)
    assert scan.suspects(evidence) == suspects
    assert (finding.strength >= 1) == (verdict == "backdoored")
    assert (finding.strength < scan.clear) == (verdict == "clean" or math.isnan(ahead))
    assert finding.suspect == suspects[0] if suspects else finding.suspect is not None
    assert from_json(Finding, to_json(finding)) == finding


@pytest.mark.parametrize(
    ("index", "share", "most", "parts"),
    [
        (3.0, 0.35, 0.35, (1.0, 1.0)),
        (6.0, 0.35, 0.35, (2.0, 1.0)),
        (1.5, 0.35**2, 0.35, (0.5, 2.0)),
        (6.0, 0.9, 1.0, (2.0, 2.0)),  # no bound on the share
        (-1.0, 0.5, 0.35, (0.0, 0.0)),
        (9.0, 1.0, 0.35, (0.0, 0.0)),
    ],
)
def test_both_parts_are_1_at_their_bounds(index, share, most, parts):
    assert outlying(index, share, 3.0, most) == pytest.approx(parts)


def test_with_few_classes_the_smallest_patch_is_suspected():
    evidence = replace(_evidence((40.0, 5.0, 41.0), 0.0), alone={}, joint={}, favourites={})
    assert Scan().judge(evidence).finding.verdict == "undecided"
    assert Scan().suspects(evidence) == [1]


def test_families_that_disagree_count_as_the_weaker():
    evidence = _evidence(ALIKE, 5.0)
    weak = Favourite(1, 2.0, 0.2 * Scan().doubt, 1.0)
    finding = (
        Scan()
        .judge(replace(evidence, favourites={**evidence.favourites, "additive": weak}))
        .finding
    )
    assert finding.verdict == "clean"
    assert finding.strength < Scan().clear
    doubtful = replace(weak, gap=1.1 * Scan().doubt)
    two = replace(evidence, favourites={**evidence.favourites, "additive": doubtful})
    assert Scan().judge(two).finding.verdict == "undecided"
    assert Scan().suspects(two) == [0, 1]
    strong = replace(weak, label=0)
    both = replace(evidence, favourites={**evidence.favourites, "additive": strong})
    assert Scan().judge(both).finding.verdict == "undecided"


def test_the_reasons_name_the_search():
    def first(*evidence) -> str:
        return Scan().judge(_evidence(*evidence)).finding.reasons[0]

    assert "added picture (smooth) to work in the model and in its unlearned" in first(ALIKE, 2.0)
    assert "(strength 0.99, needed: 1, clean is below 0.9)" in first(ALIKE, 2.0)
    ahead = Scan().judge(_evidence(ALIKE, 0.1, ahead=1.6)).finding.reasons[0]
    assert "class 2 can be ahead of all others 1.60 times as far as any other class" in ahead
    assert "0.90 squared pixels, 22% of the lower quartile 4.00" in first(ALIKE, 0.1, SMALL_3)


def test_a_usual_scan_is_compared_with_clean_models():
    known = clean_strengths()
    assert list(known) == sorted(known)
    last = Scan().judge(_evidence(ALIKE, 0.1, SMALL_3)).finding.reasons[-1]
    count = sum(s >= Scan().judge(_evidence(ALIKE, 0.1, SMALL_3)).finding.strength for s in known)
    assert f"{count} of {len(known)} small models without a backdoor" in last
    clean = Scan().judge(_evidence(ALIKE, 0.1)).finding
    assert "without a backdoor" not in " ".join(clean.reasons)
    other = Scan(exposures=2).judge(_evidence(ALIKE, 0.1, SMALL_3)).finding
    assert "without a backdoor" not in " ".join(other.reasons)


@pytest.mark.parametrize("ahead", [1.6, 1.46])
def test_without_copies_only_what_accuses_is_compared_with_clean_models(ahead):
    evidence = replace(_evidence(ALIKE, 0.1, ahead=ahead), favourites={}, joint={})
    finding = Scan().judge(evidence).finding
    accused = ahead > Scan().ahead
    assert finding.verdict == ("backdoored" if accused else "undecided")
    assert ("small models without a backdoor" in finding.reasons[-1]) == accused


def test_where_patches_differ_much_a_small_one_is_no_doubt():
    wide = (12.0, 80.0, 25.0, 60.0, 40.0, 110.0, 33.0)
    evidence = _evidence(wide, 0.1, added=(4.0, 4.2, 4.1, 3.9, 4.0, 4.0, 4.1))
    assert Scan().judge(evidence).finding.verdict == "clean"
    assert min(wide) < 0.35 * sorted(wide)[3]


@pytest.mark.parametrize(
    ("sizes", "label", "strength"),
    [
        ((30.0, 20.0, 100.0, math.inf), 1, 0.5),
        ((30.0, 20.0, 100.0, math.nan), 1, 0.5),
        ((40.0, 36.0), 1, math.log(40 / 36) / math.log(2)),
        ((math.inf, 20.0, math.inf, math.inf), 1, 0.5),
        ((math.inf,) * 4, None, 0.0),
        ((20.0, math.nan, math.nan, math.nan), None, 0.0),
        ((30.0, 5.0, 100.0, math.inf), 1, 0.99),  # smaller than natural ones: a doubt
        ((30.0, NATURAL_FILTER * 0.45**0.9, 100.0, math.inf), 1, 0.9),
        ((6.0, 5.0, 100.0, math.inf), 1, math.log(1.2) / math.log(2)),  # so is the next
    ],
)
def test_filters_support_and_cast_doubt_where_they_are_small(sizes, label, strength):
    found = filter_sign(_recovered(sizes), 2.0, NATURAL_FILTER, 0.45)
    assert [sign.label for sign in found] == ([] if label is None else [label])
    assert [sign.strength for sign in found] == pytest.approx([strength] * len(found))


def test_a_natural_filter_changes_small_and_grey_images_less():
    small = _evidence(ALIKE, 0.1)
    assert natural_filter(small) == pytest.approx(NATURAL_FILTER / 4)
    assert natural_added(small) == pytest.approx(NATURAL_ADDED / 4)
    grey = replace(small.inverted, patterns=small.inverted.patterns[:, :1])
    assert natural_filter(replace(small, inverted=grey)) == pytest.approx(NATURAL_FILTER / 12)


@pytest.mark.parametrize(
    ("sizes", "accused"),
    [
        ((0.2, 3.0, 0.1, 0.44, 3.0, 3.0), [2, 0, 3]),  # the smallest first
        ((0.2, 3.0, 0.1, 0.46, 3.0, 3.0), [2, 0]),
        ((0.2, math.inf, math.nan, 0.3, 3.0), [0, 3]),
        ((0.2, 3.0, 3.0, 3.0), []),  # one alone is compared
        ((0.2, 0.1, 0.1, 3.0), []),  # led anywhere
        ((3.0, 4.0, math.inf), []),
        ((math.nan,) * 3, []),
    ],
)
def test_several_classes_are_accused_whose_pictures_are_too_small_for_any(sizes, accused) -> None:
    signs = several_signs(_recovered(sizes), NATURAL_ADDED, 0.45)
    assert [sign.label for sign in signs] == accused
    assert all(sign.strength >= 1 for sign in signs)


def test_several_targets_hide_each_other_and_are_found() -> None:
    added = tuple(size * NATURAL_ADDED / 4 for size in (0.4, 0.1, 0.12, 1.6, 2.0, 1.8, 2.1, 0.15))
    evidence = _evidence((20.0, 8.0, 9.0, 30.0, 31.0, 29.0, 33.0, 8.5), 0.1, added)  # 16 x 16
    (alone,) = added_signs(evidence.alone["additive"], Scan().index, Scan().ratio)
    assert alone.strength < 1
    finding = Scan().judge(evidence).finding
    assert (finding.verdict, finding.targets) == ("backdoored", (1, 2, 7))
    assert Scan().suspects(evidence) == [1, 2, 7]
    assert "without a backdoor no class needs less than 0.25" in finding.reasons[0]
    assert [said[:13] for said in finding.reasons[:3]] == [f"class {k} needs" for k in (1, 2, 7)]
    assert [s.label for s in finding.signs if s.search == "added pictures"] == [1, 2, 7, 0]


def test_of_several_signs_of_a_class_the_strongest_stays() -> None:
    signs = [
        Sign("a", 1, 0.5, ""),
        Sign("b", 1, 0.2, ""),
        Sign("a", 1, 1.5, ""),
        Sign("a", 2, 1, ""),
    ]
    assert one_of_each(signs) == [signs[2], signs[1], signs[3]]


def _looked_again(scan: Scan, evidence: Evidence, progress: Progress = silent) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    data = planted.stripes(60, seed=3)
    return Gathering(scan, planted.model(False), data, generator, progress).again(evidence)


def test_copies_alone_are_looked_at_again_with_filters_in_the_model():
    scan, evidence = Scan(joint=Joint(steps=2)), _evidence(ALIKE[:4], 2.0, added=ALIKE[:4])
    assert Scan().judge(evidence).finding.verdict == "undecided"
    filters = _looked_again(scan, evidence).alone["filter"]
    assert filters.classes == evidence.joint["smooth"].classes

    def verdict(*sizes: float) -> str:
        alone = {**evidence.alone, "filter": _recovered(sizes)}
        return Scan().judge(replace(evidence, alone=alone)).finding.verdict

    assert verdict(20.0, 60.0, 90.0, 80.0) == "undecided"  # the class of the copies
    assert verdict(60.0, 20.0, 90.0, 80.0) == "clean"
    assert verdict(*(math.inf,) * 4) == "clean"
    supported = replace(evidence, alone={"additive": _recovered((3.2, 4.2, 4.1, 4.0))})
    assert _looked_again(scan, supported) is supported


def test_where_nothing_is_unusual_filters_are_sought_for_all_classes():
    scan, evidence = Scan(joint=Joint(steps=2)), _evidence(ALIKE[:4], 0.3, added=ALIKE[:4])
    assert Scan().judge(evidence).finding.verdict == "clean"
    assert _looked_again(scan, evidence).alone["filter"].classes == (0, 1, 2, 3)

    def judged(*sizes: float) -> Finding:
        alone = {**evidence.alone, "filter": _recovered(sizes)}
        return Scan().judge(replace(evidence, alone=alone)).finding

    assert judged(90.0, 60.0, 20.0, 80.0).verdict == "clean"
    small = judged(90.0, 60.0, 2.0, 80.0)  # of 16 x 16 pixels
    assert (small.verdict, small.suspect) == ("undecided", 2)
    assert "a filter that changes pictures by 2.0 squared pixels" in small.reasons[0]
    accused = replace(evidence, alone={"additive": _recovered((0.2, 4.2, 4.1, 4.0))})
    assert _looked_again(scan, accused) is accused


def test_margins_alone_are_looked_at_again_from_more_starts():
    evidence = _evidence(ALIKE[:4], 0.1, added=ALIKE[:4])
    margins = Margins((1.0, 9.0, 14.6, 2.0), (1.0, 9.0, 14.6, 10.0))
    evidence = replace(evidence, margins=margins)
    assert Scan().judge(evidence).finding.verdict == "undecided"
    found = _looked_again(Scan(margins=MarginSearch(steps=2)), evidence).margins
    assert all(a >= b for a, b in zip(found.noise, margins.noise, strict=True))
    assert _looked_again(Scan(margins=None), evidence) is evidence


def test_without_time_for_a_second_look_a_doubt_stands_and_nothing_is_called_clean():
    scan, late = Scan(joint=Joint(steps=2)), Deadline(1.0, spent=2.0).watching(silent)
    doubted = _evidence(ALIKE[:4], 2.0, added=ALIKE[:4])
    found = _looked_again(scan, doubted, late)
    assert scan.judge(found).finding.verdict == "undecided"
    assert scan.suspects(found) == scan.suspects(doubted)
    assert "1 s has passed before the doubt could be looked into" in found.notes[-1]
    with pytest.raises(TimeLimitError):
        _looked_again(scan, _evidence(ALIKE[:4], 0.3, added=ALIKE[:4]), late)


def test_a_broken_search_for_added_pictures_never_says_clean():
    for evidence in (
        _evidence(ALIKE, 0.0, joint_size=math.nan),
        _evidence(ALIKE, 0.0, added=(4.0, 4.0, 4.0, 4.0, math.nan)),
    ):
        finding = Scan().judge(evidence).finding
        assert finding.verdict == "undecided"
        assert "NaN" in finding.reasons[0]


def test_a_whole_scan_makes_all_searches(data, generator):
    scan = Scan(
        cleanse=NeuralCleanse(inversion=Inversion(steps=3)),
        unlearning=Unlearning(epochs=1, stop_accuracy=-1.0),
        joint=Joint(steps=3),
    )
    told: list[str] = []
    found = scan(
        planted.model(backdoored=False),
        data,
        generator=generator,
        progress=lambda name, *_: told.append(name),
    )
    searches = {"margins", "waves", "invert additive", "invert additive jointly"}
    searches |= {"invert smooth", "invert smooth jointly", "invert warp", "invert filter"}
    assert {*told} == {"invert", "unlearn 1", "unlearn 2", "unlearn 3", *searches}
    alone = {f"invert {name}" for name in ("additive", "smooth", "warp", "elsewhere")}
    timed = {"invert", *alone, "margins", "waves", "unlearn", "invert jointly", "look again"}
    assert {*found.trace.seconds} == timed
    assert found.inverted is not None
    assert found.finding.strength is not None


def test_a_class_whose_search_diverged_is_not_the_next_one() -> None:
    sizes = (5.0, math.nan, 1.0, 6.0, 5.5)
    (found,) = smooth_sign(_recovered(sizes), 3.0, 0.45, 2.0)
    (without,) = smooth_sign(_recovered((5.0, math.inf, 1.0, 6.0, 5.5)), 3.0, 0.45, 2.0)
    assert found == without
    assert found.label == 2
    assert "only 1.00 squared pixels, 5.0 times smaller" in found.reason


@pytest.mark.parametrize("sign", [added_signs, smooth_sign])
def test_of_many_classes_the_smallest_says_less(sign) -> None:
    usual = [4.0 + 0.1 * (k % 5) for k in range(9)]
    bounds = (3.0, 0.45) if sign is added_signs else (3.0, 0.45, 2.0)
    (few,) = sign(_recovered((1.0, *usual)), *bounds)
    (many,) = sign(_recovered((1.0, *usual, *usual, *usual, *usual[:5])), *bounds)
    same = many.strength / crowded(33)
    assert crowded(4) == crowded(10) == 1
    assert crowded(100) == pytest.approx(math.sqrt(0.5))
    assert few.strength > 1
    assert same == pytest.approx(few.strength, rel=0.1)


@pytest.mark.parametrize(
    ("family", "sizes", "verdict", "suspects"),
    [
        ("smooth", (20.0, 22.0, 21.0, 4.0, 19.0), "backdoored", [3]),
        ("smooth", (20.0, 22.0, 21.0, 4.0, 5.0), "clean", []),  # the next class is near
        ("smooth", (20.0, 22.0, 21.0, 18.0, 19.0), "clean", []),
        ("warp", (math.inf, 0.1, math.inf, 3.0, math.inf), "backdoored", [1]),  # 16 x 16 images
        ("warp", (math.inf, 0.55, math.inf, 3.0, math.inf), "undecided", [1]),
        ("warp", (math.inf, 2.5, math.inf, 3.0, math.inf), "clean", []),
        ("warp", (math.inf,) * 5, "clean", []),
    ],
)
def test_smooth_pictures_and_warps_are_signs(family, sizes, verdict, suspects):
    evidence = _evidence(ALIKE, 0.1)
    evidence = replace(evidence, alone={**evidence.alone, family: _recovered(sizes)})
    assert Scan().judge(evidence).finding.verdict == verdict
    assert Scan().suspects(evidence) == suspects


TURNED = tuple(tuple(9 * (k == (i + 1) % 5) for k in range(5)) for i in range(5))
ONE_WAY = ((0, 9, 0, 0, 0),) * 5
FEW = tuple(tuple(4 * (k == (i + 1) % 5) for k in range(5)) for i in range(5))


@pytest.mark.parametrize(
    ("size", "flows", "verdict", "suspects"),
    [
        (0.4, TURNED, "backdoored", [ELSEWHERE]),
        (1.9, TURNED, "undecided", [ELSEWHERE]),
        (12.0, TURNED, "clean", []),  # without a backdoor it takes more
        (0.4, ONE_WAY, "clean", []),
        (0.4, FEW, "clean", []),  # where so few images go is chance
        (math.inf, TURNED, "clean", []),
    ],
)
def test_a_picture_that_leads_every_class_elsewhere_is_a_sign(size, flows, verdict, suspects):
    elsewhere = replace(_recovered((size,)), classes=(ELSEWHERE,))
    evidence = replace(
        _evidence(ALIKE, 0.1, (4.0, 4.2, 4.1, 3.9, 4.0)), elsewhere=elsewhere, flows=flows
    )
    finding = Scan().judge(evidence).finding
    assert finding.verdict == verdict
    assert finding.target is None
    assert Scan().suspects(evidence) == suspects
    if suspects:
        assert "leads the images of 5 classes to 5 other ones" in finding.reasons[0]
    assert {s.search for s in finding.signs} >= {"Neural Cleanse", "added pictures"}


def test_where_no_copy_can_be_unlearned_the_other_searches_decide():
    brief = {"joint": Joint(steps=2), "margins": None, "waves": None}
    scan = replace(Scan(), cleanse=NeuralCleanse(inversion=Inversion(steps=2)), **brief)
    data, model = planted.stripes(60, seed=3), planted.model(False)
    wild = replace(scan, unlearning=Unlearning(batch_size=32, lr=1e30, retries=0))

    def scanned(scan: Scan):
        return scan(model, data, generator=torch.Generator().manual_seed(0))

    found, without = scanned(wild), scanned(replace(scan, unlearning=None))
    assert "copies could not be unlearned" in found.trace.notes[0]
    assert found.finding.signs == without.finding.signs
    assert not without.trace.notes


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
    found = rivals(_recovered(sizes), [counts])
    assert len(found) == 10
    assert {4, 7, *range(23, 30)} < {*found}
    assert found == sorted(found)
    assert rivals(_recovered(sizes[:5]), [counts[:5]]) == list(range(5))
    assert 0 not in rivals(_recovered([math.nan, *sizes[1:]]), [counts[::-1]])


def test_a_copy_that_favours_another_class_is_left_out():
    assert agreeing([(9, 1, 0), (2, 3, 4), (8, 1, 1)]) == [0, 2]
    assert agreeing([(0, 9, 0), (9, 0, 0)]) == [0]
    assert agreeing([(0, 9, 0)]) == [0]
