"""What the evidence of a scan says: signs, suspects and the verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from seen import ALIKE, observed, recovered

from reprune.detection import Favourite, Scan
from reprune.detection.calibration import clean_strengths
from reprune.detection.evidence import NATURAL_ADDED, NATURAL_FILTER, natural_added, natural_filter
from reprune.detection.signs import (
    added_signs,
    crowded,
    filter_sign,
    one_of_each,
    outlying,
    several_signs,
    smooth_sign,
)
from reprune.evaluation import ELSEWHERE
from reprune.results import Finding, Sign, from_json, to_json

ODD = (40.0, 42.0, 3.0, 41.0, 43.0)
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
    scan, evidence = Scan(), observed(sizes, joint, added, ahead=ahead)
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
    evidence = replace(observed((40.0, 5.0, 41.0), 0.0), alone={}, joint={}, favourites={})
    assert Scan().judge(evidence).finding.verdict == "undecided"
    assert Scan().suspects(evidence) == [1]


def test_a_sign_of_patches_says_which_classes_it_compares():
    """Neural Cleanse's own median is over all classes; it counts those without a patch, too."""
    evidence = replace(observed((20.0, 20.0, 20.0, 8.0, math.inf), 0.0), joint={}, favourites={})
    (sign,) = (one for one in Scan().signs(evidence) if one.search == "Neural Cleanse")
    assert "40% of the median 20.0 over the classes that have one" in sign.reason


def test_families_that_disagree_count_as_the_weaker():
    evidence = observed(ALIKE, 5.0)
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
        return Scan().judge(observed(*evidence)).finding.reasons[0]

    assert "added picture (smooth) to work in the model and in its unlearned" in first(ALIKE, 2.0)
    assert "(strength 0.99, needed: 1, clean is below 0.9)" in first(ALIKE, 2.0)
    ahead = Scan().judge(observed(ALIKE, 0.1, ahead=1.6)).finding.reasons[0]
    assert "class 2 can be ahead of all others 1.60 times as far as any other class" in ahead
    assert "0.90 squared pixels, 22% of the lower quartile 4.00" in first(ALIKE, 0.1, SMALL_3)


def test_a_usual_scan_is_compared_with_clean_models():
    known = clean_strengths()
    assert list(known) == sorted(known)
    last = Scan().judge(observed(ALIKE, 0.1, SMALL_3)).finding.reasons[-1]
    count = sum(s >= Scan().judge(observed(ALIKE, 0.1, SMALL_3)).finding.strength for s in known)
    assert f"{count} of {len(known)} small models without a backdoor" in last
    clean = Scan().judge(observed(ALIKE, 0.1)).finding
    assert "without a backdoor" not in " ".join(clean.reasons)
    other = Scan(exposures=2).judge(observed(ALIKE, 0.1, SMALL_3)).finding
    assert "without a backdoor" not in " ".join(other.reasons)


@pytest.mark.parametrize("ahead", [1.6, 1.46])
def test_without_copies_only_what_accuses_is_compared_with_clean_models(ahead):
    evidence = replace(observed(ALIKE, 0.1, ahead=ahead), favourites={}, joint={})
    finding = Scan().judge(evidence).finding
    accused = ahead > Scan().ahead
    assert finding.verdict == ("backdoored" if accused else "undecided")
    assert ("small models without a backdoor" in finding.reasons[-1]) == accused


def test_where_patches_differ_much_a_small_one_is_no_doubt():
    wide = (12.0, 80.0, 25.0, 60.0, 40.0, 110.0, 33.0)
    evidence = observed(wide, 0.1, added=(4.0, 4.2, 4.1, 3.9, 4.0, 4.0, 4.1))
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
    found = filter_sign(recovered(sizes), 2.0, NATURAL_FILTER, 0.45)
    assert [sign.label for sign in found] == ([] if label is None else [label])
    assert [sign.strength for sign in found] == pytest.approx([strength] * len(found))


def test_a_natural_filter_changes_small_and_grey_images_less():
    small = observed(ALIKE, 0.1)
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
    signs = several_signs(recovered(sizes), NATURAL_ADDED, 0.45)
    assert [sign.label for sign in signs] == accused
    assert all(sign.strength >= 1 for sign in signs)


def test_several_targets_hide_each_other_and_are_found() -> None:
    added = tuple(size * NATURAL_ADDED / 4 for size in (0.4, 0.1, 0.12, 1.6, 2.0, 1.8, 2.1, 0.15))
    evidence = observed((20.0, 8.0, 9.0, 30.0, 31.0, 29.0, 33.0, 8.5), 0.1, added)  # 16 x 16
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


def test_a_broken_search_for_added_pictures_never_says_clean():
    for evidence in (
        observed(ALIKE, 0.0, joint_size=math.nan),
        observed(ALIKE, 0.0, added=(4.0, 4.0, 4.0, 4.0, math.nan)),
    ):
        finding = Scan().judge(evidence).finding
        assert finding.verdict == "undecided"
        assert "NaN" in finding.reasons[0]


def test_a_class_whose_search_diverged_is_not_the_next_one() -> None:
    sizes = (5.0, math.nan, 1.0, 6.0, 5.5)
    (found,) = smooth_sign(recovered(sizes), 3.0, 0.45, 2.0)
    (without,) = smooth_sign(recovered((5.0, math.inf, 1.0, 6.0, 5.5)), 3.0, 0.45, 2.0)
    assert found == without
    assert found.label == 2
    assert "only 1.00 squared pixels, 5.0 times smaller" in found.reason


@pytest.mark.parametrize("sign", [added_signs, smooth_sign])
def test_of_many_classes_the_smallest_says_less(sign) -> None:
    usual = [4.0 + 0.1 * (k % 5) for k in range(9)]
    bounds = (3.0, 0.45) if sign is added_signs else (3.0, 0.45, 2.0)
    (few,) = sign(recovered((1.0, *usual)), *bounds)
    (many,) = sign(recovered((1.0, *usual, *usual, *usual, *usual[:5])), *bounds)
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
    evidence = observed(ALIKE, 0.1)
    evidence = replace(evidence, alone={**evidence.alone, family: recovered(sizes)})
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
    elsewhere = replace(recovered((size,)), classes=(ELSEWHERE,))
    evidence = replace(
        observed(ALIKE, 0.1, (4.0, 4.2, 4.1, 3.9, 4.0)), elsewhere=elsewhere, flows=flows
    )
    finding = Scan().judge(evidence).finding
    assert finding.verdict == verdict
    assert finding.target is None
    assert Scan().suspects(evidence) == suspects
    if suspects:
        assert "leads the images of 5 classes to 5 other ones" in finding.reasons[0]
    assert {s.search for s in finding.signs} >= {"Neural Cleanse", "added pictures"}
