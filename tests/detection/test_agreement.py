"""Agreement of searches: which signs name a class together, and how strongly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reprune.detection.agreement import (
    AGREEMENT,
    agreement_sign,
    lone_doubt,
    settled,
    supporting,
)
from reprune.results import Sign

CLEAR = 0.9
PATCHES, ADDED, SMOOTH = "Neural Cleanse", "added pictures", "smooth pictures"
WARPS, MARGINS, WAVES, JOINT = "warps", "largest margins", "waves", "joint inversion, smooth"
FILTERS, OTHER_JOINT = "filters", "joint inversion, additive"
FIVE = ("PATCHES_2", "ADDED_2", "SMOOTH_2", "MARGINS_2", "WAVES_2")


def signs(**strengths: float) -> list[Sign]:
    """Keyword: search and class, as `WARPS_2`."""
    named = (key.rsplit("_", 1) for key in strengths)
    return [
        Sign(globals()[search], int(label), strength, "")
        for (search, label), strength in zip(named, strengths.values(), strict=True)
    ]


@pytest.mark.parametrize(
    ("seen", "label", "strength"),
    [
        ({"SMOOTH_2": 0.5, "WARPS_2": 0.4, "MARGINS_2": 0.125}, 2, 0.9),
        ({"SMOOTH_2": 0.5, "WARPS_2": 0.4, "MARGINS_2": 0.1, "WAVES_2": 0.05}, 2, 0.72),
        ({"SMOOTH_2": 0.8, "WARPS_2": 0.8, "MARGINS_2": 0.8}, 2, 0.99),  # never accuses
        ({"SMOOTH_2": 0.8, "ADDED_2": 0.8, "PATCHES_2": 0.8}, None, 0),  # one kind
        ({"SMOOTH_2": 0.8, "WARPS_1": 0.8, "MARGINS_3": 0.8}, None, 0),
        ({"SMOOTH_2": 0.8, "WARPS_2": 0.8}, None, 0),  # two are not enough
        ({"PATCHES_2": 0.6, "JOINT_2": 0.5}, 2, 0.9),  # unless one is the joint search
        ({"PATCHES_2": 0.3, "JOINT_2": 0.8}, 2, 0.54),
        ({"PATCHES_2": 0.6, "JOINT_1": 0.8}, None, 0),
        ({"WARPS_2": 0.7, "PATCHES_2": 0.6, "JOINT_2": 0.4}, 2, 0.99),  # three kinds, too
        ({"PATCHES_2": 0.6, "JOINT_2": 0.95}, None, 0),  # a reason for doubt alone
        ({"SMOOTH_2": 1.5, "WARPS_1": 0.4, "MARGINS_1": 0.4, "WAVES_1": 0.4}, None, 0),
        ({"PATCHES_2": 0.6, "WARPS_2": 0.0, "MARGINS_2": 0.0}, None, 0),
        ({"FILTERS_2": 0.5, "WARPS_2": 0.5, "MARGINS_2": 0.5}, None, 0),  # filters are no kind
        ({"FILTERS_2": 0.5, "JOINT_2": 0.8}, None, 0),  # natural ones name the copies' class, too
        ({"FILTERS_2": 0.95, "JOINT_2": 0.5}, None, 0),  # a reason for doubt alone
        (dict.fromkeys(FIVE[:4], 0.1) | {"FILTERS_2": 0.5}, None, 0),
        (dict.fromkeys(FIVE, 0.1), 2, 0.9),  # five searches, of three kinds
        (dict.fromkeys(FIVE, 0.1) | {"PATCHES_2": 0.8, "WAVES_2": 0.05}, 2, 0.45),
        (dict.fromkeys(FIVE, 0.2) | {"WAVES_1": 0.2}, 2, 0.99),
        (dict.fromkeys(FIVE[:4], 0.2), None, 0),  # four are not enough
        (dict.fromkeys(FIVE[:4], 0.2) | {"WAVES_1": 0.2}, None, 0),
        ({}, None, 0),
    ],
)
def test_searches_that_name_one_class(seen, label, strength) -> None:
    found = agreement_sign(signs(**seen), CLEAR)
    assert [sign.label for sign in found] == ([] if label is None else [label])
    assert [sign.strength for sign in found] == pytest.approx([strength] if found else [])


def test_all_to_all_names_no_class() -> None:
    elsewhere = Sign("all-to-all", None, 0.8, "")
    assert not agreement_sign([elsewhere, *signs(WARPS_2=0.8, MARGINS_2=0.8)], CLEAR)


def test_the_strongest_agreement_counts_and_says_who_agrees() -> None:
    seen = signs(WARPS_1=0.3, MARGINS_1=0.3, SMOOTH_1=0.3, PATCHES_2=0.6, JOINT_2=0.55, WAVES_2=0.0)
    (found,) = agreement_sign(seen, CLEAR)
    assert found.label == 1
    assert found.search == AGREEMENT
    for part in ("class 1", "warps 0.30", "largest margins 0.30", "smooth pictures 0.30"):
        assert part in found.reason
    (other,) = agreement_sign([*seen[3:], *signs(WARPS_1=0.3)], CLEAR)
    assert other.label == 2
    assert "waves" not in other.reason


def test_what_supports_an_agreement() -> None:
    seen = signs(SMOOTH_2=0.5, WARPS_2=0.4, MARGINS_2=0.3, WAVES_2=0.05, PATCHES_1=0.6, JOINT_2=0.2)
    agreed = [*seen, *agreement_sign(seen, CLEAR)]
    assert supporting(agreed) == seen[:3]
    assert not supporting(seen)


def test_suspects_are_sure_where_the_model_alone_names_them_too() -> None:
    joint = Sign("joint inversion, smooth", 2, 0.99, "")
    patches, faint, other = (
        Sign("Neural Cleanse", k, s, "") for k, s in ((2, 0.4), (2, 0.05), (1, 0.4))
    )
    assert supporting([joint, patches, other]) == [patches]
    assert not supporting([joint, faint, other, Sign("joint inversion, additive", 2, 0.9, "")])
    assert not supporting([replace(patches, strength=0.95), replace(joint, strength=0.9)])
    assert not supporting([])


def test_what_supports_a_filter_that_casts_doubt_alone() -> None:
    seen = signs(FILTERS_2=0.95, SMOOTH_2=0.3, WARPS_2=0.05, JOINT_2=0.2, PATCHES_1=0.6)
    assert supporting(seen) == seen[:2]


@pytest.mark.parametrize(
    ("seen", "lone"),
    [
        ({"JOINT_2": 0.95}, "JOINT"),
        ({"JOINT_2": 0.95, "PATCHES_2": 0.09, "WARPS_1": 0.8}, "JOINT"),
        ({"JOINT_2": 0.95, "PATCHES_2": 0.1}, None),
        ({"JOINT_2": 0.95, "OTHER_JOINT_2": 0.95}, "JOINT"),  # one kind
        ({"MARGINS_2": 0.95, "JOINT_2": 0.0}, "MARGINS"),
        ({"MARGINS_2": 0.95, "JOINT_2": 0.3}, None),
        ({"PATCHES_2": 0.95, "ADDED_2": 0.8}, "PATCHES"),
        ({"JOINT_2": 0.89}, None),  # no doubt
        ({"MARGINS_2": 1.2, "JOINT_1": 0.95}, None),  # accused
        ({}, None),
    ],
)
def test_a_doubt_that_one_kind_of_search_alone_raises(seen, lone) -> None:
    found = lone_doubt(signs(**seen), CLEAR)
    assert (found.search if found else None) == (globals()[lone] if lone else None)


def test_after_a_second_look_the_joint_search_needs_a_search_in_the_model_alone() -> None:
    alone = settled(signs(JOINT_2=0.99, OTHER_JOINT_1=0.99, FILTERS_4=0.5), CLEAR)
    assert [s.strength for s in alone] == pytest.approx([0.45, 0.45, 0.5])
    assert "no search in the model alone names it" in alone[0].reason
    for seen in ({"JOINT_2": 0.99, "FILTERS_2": 0.0}, {"MARGINS_2": 0.95}, {"JOINT_2": 0.3}):
        assert settled(signs(**seen), CLEAR) == signs(**seen)
