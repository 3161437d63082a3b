"""The papers' tables as experiments: complete, runnable, beside the printed numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import pytest
from torch import nn

from reprune.attacks import make_attack
from reprune.benchmark.catalog import TABLES, table
from reprune.benchmark.default import RECOVERY, SETTINGS, STEPS
from reprune.benchmark.profiles import PROFILES, SMALL, given_models
from reprune.benchmark.published import VALUES, printed, published
from reprune.benchmark.selection import selectable
from reprune.benchmark.settings import beginning, configured, with_settings
from reprune.benchmark.spec import NONE, Experiment, ModelSpec
from reprune.benchmark.subjects import weights_digest
from reprune.defenses import make_defense
from reprune.errors import ModelError, UnknownNameError
from reprune.models import ARCHITECTURES, build_network, zoo_models
from reprune.training import Training

EVERY = [(name, profile) for name in TABLES for profile in PROFILES]


@pytest.mark.parametrize(("name", "profile"), EVERY)
def test_every_experiment_could_run(name: str, profile: str) -> None:
    """Methods, their settings, attacks, trainings and selections are all known and valid."""
    seen: set[str] = set()
    for experiment in table(name, profile).experiments():
        assert experiment.key not in seen
        seen.add(experiment.key)
        if experiment.method != NONE:
            method = configured(experiment)
            method.check()
            if experiment.selection != "defender":
                assert selectable(method)
        _check_model(experiment.model)


@cache
def built(arch: str) -> nn.Module:
    """A network of a library."""
    return build_network(arch, 12)


def _check_model(model: ModelSpec) -> None:
    make_attack(model.attack, **model.parameters)
    with_settings(Training(), model.training).check()
    assert model.arch in ARCHITECTURES or built(model.arch)
    assert (model.source is None) == (model.sha256 is None)
    if model.source is None and (model.regime == "implant"):
        assert model.start is not None
    if model.start is not None:
        assert model.start.attack == "clean"
        _check_model(model.start)


NUMBERED = ("table2", "table3", "table4", "table7", "table8", "table9", "table10", "table11")
NUMBERED += ("table12", "table13", "table14", "table15", "table16")


@pytest.mark.parametrize("name", NUMBERED)
def test_every_printed_row_stands_beside_an_experiment(name: str) -> None:
    """In the paper profile, but for averages; Table 14 prints its baseline once."""
    one = table(name, "paper")
    shown = [one.printed(row) for row in one.rows]
    wanted = [
        {key: row[key] for key in VALUES if key in row}
        for row in published(name)
        if row["attack"] != "average"
    ]
    for values in wanted:
        assert values in shown
    assert sum(map(bool, shown)) == len(wanted)


def test_printed_numbers_are_the_papers() -> None:
    assert printed("table2", {"data": "cifar10", "attack": "badnets", "method": "rnp"}) == {
        "ca": 92.22,
        "asr": 0.2,
    }
    rows = [r for r in published("table2") if r["data"] == "cifar10" and r["attack"] != "average"]
    for method, mean in (("fp", 56.45), ("nad", 13.65), ("ibau", 21.77), ("anp", 14.25)):
        assert fmean(r["asr"] for r in rows if r["method"] == method) == pytest.approx(
            mean, abs=0.006
        )


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown table 'table99'; known are table2, "):
        table("table99", "small")
    with pytest.raises(UnknownNameError, match="unknown profile 'huge'; known are small, paper"):
        table("table2", "huge")
    assert printed("table99", {}) == {}


def test_the_small_profile_takes_the_zoo_with_its_weights() -> None:
    models = {e.model.source: e.model for e in table("table2", "small").experiments()}
    badnets = models["zoo:badnets"]
    assert badnets.sha256 == weights_digest(zoo_models()["badnets"])
    assert badnets.start is not None
    assert badnets.start.source == "zoo:clean"
    assert badnets.width == 16
    made = models[None]
    assert (made.attack, made.regime, made.start.source) == ("wanet", "implant", "zoo:clean")


def test_the_paper_profile_trains_everything_as_printed() -> None:
    for experiment in table("table2", "paper").experiments():
        assert experiment.model.source is None
        assert experiment.test_images is None
        trained = with_settings(Training(), experiment.model.training)
        assert (trained.epochs, trained.lr, trained.schedule) == (200, 0.1, "steps")


def test_three_draws_and_all_selections_in_the_small_table_2() -> None:
    one = table("table2", "small")
    by = {(r.where["attack"], r.where["method"]): r.experiments for r in one.rows}
    assert {len(es) for es in by["blend", "fp"].values()} == {3}
    assert list(by["blend", "rnp"]) == ["defender", "fixed", "oracle"]
    assert list(by["clean", "fp"]) == ["defender"]
    assert {e.draw for e in by["blend", "rnp"]["oracle"]} == {0, 1, 2}


def test_given_models_join_the_tables_of_every_method(models, shipped) -> None:
    size = replace(SMALL, others=given_models([models], {"cifar10": "demo"}))
    experiments: list[Experiment] = table("detectors", size).experiments()
    assert shipped.key in {e.model.key for e in experiments}
    assert (shipped.data, shipped.source) == ("demo", "models:shipped")


def test_a_card_without_a_data_set_is_refused(tmp_path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "card.json").write_text('{"name": "x", "num_classes": 2}')
    with pytest.raises(ModelError, match="names no data set"):
        given_models([tmp_path])


@pytest.mark.parametrize(
    "settings", [STEPS, SETTINGS, RECOVERY], ids=["steps", "settings", "recovery"]
)
def test_all_but_the_first_differ_from_the_default(settings: dict[str, dict[str, Any]]) -> None:
    whole = make_defense("auto")
    changed = [with_settings(whole, own) for own in settings.values()]
    for one in changed:
        one.check()
    assert changed[0] == whole
    assert all(one != whole for one in changed[1:])


@pytest.mark.parametrize(
    ("name", "settings"), [("auto-settings", SETTINGS), ("auto-recovery", RECOVERY)]
)
def test_settings_to_choose_among_share_the_scans_of_the_last_draw(
    name: str, settings: dict[str, dict[str, Any]]
) -> None:
    experiments = table(name, "small").experiments()
    assert {e.draw for e in experiments} == {2}
    assert all("reactivation" in e.metrics for e in experiments)
    models = {e.model.key for e in experiments}
    assert len(experiments) == len(models) * len(settings)
    assert len({beginning(e).key for e in experiments}) == len(models)


def test_re_activation_takes_the_runs_of_the_last_draw() -> None:
    every = {e.run.key for e in table("defenses", "small").experiments()}
    woken = [e for e in table("reactivation", "small").experiments() if e.method != NONE]
    assert {e.draw for e in woken} == {2}
    assert {e.run.key for e in woken} <= every
