"""`reprune methods`, and purifying with methods other than RNP."""

from __future__ import annotations

import json

import pytest

import planted
from reprune.attacks import poison
from reprune.cli.methods import COMMANDS
from reprune.defenses import DEFENSES, TRAINING_DEFENSES
from reprune.models import load_model

from .conftest import write_npz


def test_every_method_is_listed_with_what_it_needs_gives_and_costs(reprune):
    outcome = reprune("methods")
    assert outcome.status == 0
    for registry in COMMANDS.values():
        assert all(name in outcome.out for name in registry if ":" not in name)
    rows = {(row["command"], row["method"]): row for row in reprune("methods", "--json").json()}
    assert rows["purify", "clp"]["needs"] == ["clean labels"]
    assert rows["purify", "abl"]["needs"] == ["training data"]
    assert rows["purify", "fp"]["presets"] == ["fp:paper"]
    # the RNP paper's Table 1
    gains = ("detection", "trigger", "removal")
    assert [rows["purify", "rnp"][gain] for gain in gains] == [True, True, True]
    assert [rows["scan", "nc"][gain] for gain in gains] == [True, True, False]
    assert [rows["filter", "strip"][gain] for gain in gains] == [True, False, False]
    for name in ("abl", "ibau", "anp"):
        assert [rows["purify", name][gain] for gain in gains] == [False, False, True]
    assert all(row["passes"] > 0 for row in rows.values())


@pytest.mark.parametrize("name", [*DEFENSES, *TRAINING_DEFENSES])
def test_every_name_makes_a_method_that_can_be_described(name):
    from reprune.defenses import make_defense
    from reprune.report import describe

    method = make_defense(name)
    method.check()
    assert method.title
    assert all(
        value is None or isinstance(value, bool | int | float | str)
        for value in describe(method).values()
    )


def test_an_unknown_method_names_the_likely_ones(reprune, files, tmp_path):
    output = tmp_path / "out"
    arguments = (files.backdoored, "--data", files.npz, "--output", output)
    outcome = reprune("purify", *arguments, "--method", "nc+tf")
    assert outcome.status == 2
    assert "unknown method 'nc+tf'; known methods: auto, auto:low," in outcome.err
    assert "did you mean nc+ft" in outcome.err
    assert not output.exists()


def test_fine_tuning_writes_a_model_and_says_that_nothing_was_pruned(reprune, files, tmp_path):
    output = tmp_path / "out"
    arguments = (files.backdoored, "--data", files.npz, "--output", output, "--samples", 100)
    outcome = reprune("purify", *arguments, "--method", "ft", "--json")
    report = outcome.json()
    assert outcome.status == (0 if report["trace"]["repaired"] else 5)
    assert report["method"]["name"] == "ft"
    assert list(report["trace"]["phases"]) == ["fine-tune"]
    assert report["budget"] is None
    assert "No channel was pruned" in (output / "report.html").read_text()
    assert load_model(output).classifier.num_classes == 4


def test_a_budget_is_refused_where_nothing_is_pruned_by_one(reprune, files, tmp_path):
    arguments = (files.backdoored, "--data", files.npz, "--output", tmp_path / "out")
    outcome = reprune("purify", *arguments, "--method", "ft", "--max-accuracy-drop", 0.01)
    assert outcome.status == 2
    assert "the method ft does not prune within an accuracy budget" in outcome.err


def test_a_method_that_trains_anew_needs_its_training_data(reprune, files, tmp_path):
    arguments = (files.backdoored, "--data", files.npz, "--output", tmp_path / "out")
    outcome = reprune("purify", *arguments, "--method", "abl")
    assert outcome.status == 2
    assert "needs its training data (--training-data)" in outcome.err
    outcome = reprune("purify", *arguments, "--training-data", files.npz)
    assert outcome.status == 2
    assert "takes clean images only" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_anew_gives_a_model(reprune, files, tmp_path, generator):
    training = poison(planted.stripes(300, seed=5), planted.ATTACK, generator).data
    output = tmp_path / "out"
    outcome = reprune(
        *("purify", files.backdoored, "--data", files.npz, "--output", output),
        *("--method", "abl", "--training-data", write_npz(tmp_path / "train.npz", training)),
    )
    assert outcome.status == 0
    report = json.loads((output / "report.json").read_text())
    assert list(report["trace"]["phases"]) == ["isolate", "train", "erase"]
    assert report["clean"]["after"]["ca"]["share"] > 0.8
