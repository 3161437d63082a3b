"""Settings by dotted name."""

from __future__ import annotations

import pytest

from reprune import RNP
from reprune.benchmark.settings import with_settings
from reprune.errors import ConfigurationError
from reprune.rnp import FineTuning


def test_dotted_names_reach_inner_settings() -> None:
    changed = with_settings(RNP(), {"unlearning.epochs": 3, "pruning.by": "count", "holdout": 0.5})
    assert changed.unlearning is not None
    assert (changed.unlearning.epochs, changed.pruning.by, changed.holdout) == (3, "count", 0.5)
    assert RNP().unlearning != changed.unlearning


def test_a_part_is_taken_away_or_put_in() -> None:
    assert with_settings(RNP(), {"recovering": None}).recovering is None
    assert with_settings(RNP(), {"finetuning": {}}).finetuning == FineTuning()
    assert with_settings(RNP(), {"layers": ["layer4"]}).layers == ("layer4",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3}, "no setting 'epochs'; there are unlearning, recovering"),
        ({"unlearning.epoch": 3}, "no setting 'epoch'"),
        ({"finetuning.epochs": 3}, "there is nothing to set, the part is None"),
        ({"holdout": "much"}, "rnp: holdout = 'much'"),
        ({"pruning.by": "luck"}, "rnp: pruning.by = 'luck'"),
        ({"recovering.lr": None}, "recovering.lr = None"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        with_settings(RNP(), settings, "rnp")
