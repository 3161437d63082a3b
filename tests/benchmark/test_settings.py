"""Settings by dotted name."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import replace

import pytest

from reprune import RNP
from reprune.benchmark.settings import MAKERS, settings_digest, with_settings
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.errors import ConfigurationError
from reprune.rnp import FineTuning, Unlearning


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


def test_the_digest_tells_defaults_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Experiment(model=ModelSpec(), method="rnp")
    first = settings_digest(spec)
    assert first is not None
    assert settings_digest(replace(spec, draw=1, model=ModelSpec(attack="sig"))) == first
    assert settings_digest(replace(spec, settings={"holdout": RNP().holdout})) == first
    assert settings_digest(replace(spec, settings={"holdout": 0.5})) != first
    monkeypatch.setitem(MAKERS, "removal", lambda _: RNP(unlearning=Unlearning(lr=0.5)))
    assert settings_digest(spec) != first


def test_where_there_is_no_method_there_is_no_digest() -> None:
    assert settings_digest(Experiment(model=ModelSpec())) is None
    assert settings_digest(Experiment(model=ModelSpec(), method="luck")) is None


def test_digests_are_the_same_in_another_process() -> None:
    """No address of an object and no order of a set is in them."""
    code = (
        "from reprune.benchmark.catalog import table\n"
        "from reprune.benchmark.settings import settings_digest\n"
        "for name in ('defenses', 'detectors', 'filters'):\n"
        "    specs = {e.method: e for e in table(name, 'small').experiments()}\n"
        "    print(*(f'{m}={settings_digest(e)}' for m, e in specs.items()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(code, {})
    assert said.stdout == here.getvalue()
    assert len(said.stdout.split()) > 20
