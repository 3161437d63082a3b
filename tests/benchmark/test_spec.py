"""Specs: what names an experiment."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.results import from_json, to_json

MODEL = ModelSpec(attack="badnets", parameters={"size": 3}, width=16, seed=1)
BASE = Experiment(model=MODEL, method="rnp", settings={"pruning.by": "count"})

OTHER = {
    "model": replace(MODEL, seed=2),
    "task": "detection",
    "method": "anp",
    "settings": {"pruning.by": "fraction"},
    "images": 100,
    "draw": 1,
    "part": "test",
    "seed": 1,
    "selection": "oracle",
    "metrics": ("figures", "floor"),
    "test_images": 10,
    "precision": "float32",
}
OTHER_MODEL = {
    "data": "gtsrb",
    "attack": "blend",
    "parameters": {"size": 5},
    "arch": "vgg16",
    "width": 8,
    "regime": "implant",
    "start": ModelSpec(),
    "training": {"epochs": 1},
    "seed": 0,
    "source": "zoo:badnets",
    "sha256": "00",
}


def test_every_field_is_tested() -> None:
    assert set(OTHER) == {field.name for field in fields(Experiment)}
    assert set(OTHER_MODEL) == {field.name for field in fields(ModelSpec)}


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_field_is_another_experiment(name: str) -> None:
    assert replace(BASE, **{name: OTHER[name]}).key != BASE.key


@pytest.mark.parametrize("name", OTHER_MODEL)
def test_a_changed_field_is_another_model(name: str) -> None:
    model = replace(MODEL, **{name: OTHER_MODEL[name]})
    assert model.key != MODEL.key
    assert replace(BASE, model=model).key != BASE.key


def test_the_key_survives_json() -> None:
    spec = replace(BASE, model=replace(MODEL, start=ModelSpec()), settings={"layers": ["a"]})
    back = from_json(Experiment, json.loads(json.dumps(to_json(spec))))
    assert back.key == spec.key


def test_the_key_does_not_depend_on_the_order_of_settings() -> None:
    first = replace(BASE, settings={"a": 1, "b": 2})
    assert first.key == replace(BASE, settings={"b": 2, "a": 1}).key


def test_the_key_is_what_it_was() -> None:
    """Committed records are found by it: another value here orphans them; raise FORMAT then."""
    assert Experiment(model=ModelSpec()).key == "131052a76961da2b"


def test_prunes_of_one_ranking_share_a_run() -> None:
    defender = Experiment(model=MODEL, method="rnp", settings={"score": "mask"})
    fixed = replace(defender, selection="fixed", settings={"score": "mask", "pruning.by": "count"})
    oracle = replace(defender, selection="oracle")
    assert fixed.run.key == oracle.run.key == defender.run.key == defender.key
    assert replace(fixed, draw=1).run.key != defender.key


def test_a_defender_with_own_settings_runs_alone() -> None:
    assert BASE.run == BASE


def test_more_metrics_need_no_other_run() -> None:
    woken = replace(BASE, metrics=("figures", "reactivation"))
    assert woken.key != BASE.key
    assert woken.run.key == BASE.key


def test_labels_tell_experiments_apart() -> None:
    assert MODEL.label == "badnets size=3 resnet18-16 cifar10 seed 1"
    assert replace(MODEL, source="zoo:badnets").label == "zoo:badnets"
    assert "(oracle)" in replace(BASE, selection="oracle").label
    assert replace(BASE, part="test").label == f"{BASE.label} of test images"
