"""Results survive JSON, and what is not a result is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reprune.results import (
    BackdoorLabel,
    Epoch,
    Evaluation,
    PruningPoint,
    Rate,
    SiteMask,
    Trace,
    from_json,
    to_json,
)

RATE = Rate(3, 4, 0.75, (0.3, 0.95))
TRACE = Trace(
    phases={
        "unlearn": (Epoch(1, 2.5, 0.1), Epoch(2, -1e30, 0.0)),
        "recover": (Epoch(1, 0.25, 1.0),),
        "fine-tune": (Epoch(1, 1.0, 0.5),),
    },
    masks=(SiteMask("bn1", "conv1", (0.0, 1.0, 0.1), (-math.inf, 1.0, 0.1), (0, 2)),),
    curve=(
        PruningPoint(-math.inf, 0, 0.9, 0.0, 0.0),
        PruningPoint(-0.25, 1, 0.8, 0.1, 0.15),
    ),
    chosen=1,
    label=BackdoorLabel(None, (3, 4), 4 / 7, 1 / 7, "undecided – not clear"),
    notes=("a note",),
    seconds={"unlearn": 1.5, "prune": 0.25},
)
EVALUATION = Evaluation(RATE, (RATE, Rate(0, 0, 0.0, (0.0, 1.0))), (1, 3), 1, RATE, RATE)


def through_json(value: Any) -> Any:
    text = json.dumps(to_json(value), allow_nan=False)
    return from_json(type(value), json.loads(text))


@pytest.mark.parametrize(
    "value",
    [TRACE, Trace(), EVALUATION, replace(EVALUATION, target=None, asr=None, ra=None), RATE],
)
def test_results_come_back_equal_from_valid_json(value):
    back = through_json(value)
    assert back == value
    assert type(back) is type(value)


def test_the_empty_prune_keeps_its_threshold():
    back = through_json(TRACE).curve[0].threshold
    assert back == -math.inf
    assert to_json(TRACE)["curve"][0]["threshold"] == "-inf"


def test_nested_values_have_their_types_back():
    back = through_json(TRACE)
    assert isinstance(back.curve, tuple)
    assert isinstance(back.curve[0], PruningPoint)
    assert isinstance(back.masks[0].values, tuple)
    assert isinstance(back.label, BackdoorLabel)


@given(
    st.lists(
        st.builds(
            PruningPoint,
            threshold=st.floats(allow_nan=False),
            channels=st.integers(0, 10**6),
            accuracy=st.floats(0, 1),
            drop=st.floats(-1, 1),
            disagreement=st.floats(0, 1),
        )
    )
)
def test_any_curve_survives(points):
    trace = Trace(curve=tuple(points))
    assert through_json(trace) == trace


def test_not_a_number_stays_one():
    assert math.isnan(through_json(Epoch(1, math.nan, 0.0)).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hits": "many"}, "hits\n  Input should be a valid integer"),
        ({"interval": [0.1]}, r"interval.1\n  Field required"),
        ({"share": None}, "share\n  Input should be a valid number"),
    ],
)
def test_data_that_does_not_fit(change, message):
    with pytest.raises(ValidationError, match=message):
        from_json(Rate, to_json(RATE) | change)


def test_a_missing_field_is_named():
    data = to_json(RATE)
    del data["total"]
    with pytest.raises(ValidationError, match="total\n  Field required"):
        from_json(Rate, data)
