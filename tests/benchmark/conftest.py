"""A tiny given model with its images, as the benchmark sees it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reprune import demo
from reprune.benchmark.profiles import given_models
from reprune.benchmark.record import Record
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.benchmark.subjects import Subjects


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of given models that holds the one which ships with the package."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "shipped").mkdir()
    for name in ("card.json", "model.safetensors", "trigger.npz"):
        shutil.copy(demo.folder() / name, folder / "shipped" / name)
    return folder


@pytest.fixture(scope="session")
def shipped(models: Path) -> ModelSpec:
    """The spec of that model, on the images that ship with the package."""
    (spec,) = given_models([models], {"cifar10": "demo"})
    return spec


@pytest.fixture(scope="session")
def subjects(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(None, tmp_path_factory.mktemp("cache"), (models,))


@pytest.fixture
def record() -> Callable[..., Record]:
    """Makes a record of an experiment with these figures."""

    def make(
        method: str = "rnp", asr: float = 1.0, ca: float = 90.0, draw: int = 0, **more: Any
    ) -> Record:
        attack = more.pop("attack", "badnets")
        spec = {k: more.pop(k) for k in tuple(more) if k in Experiment.__dataclass_fields__}
        experiment = Experiment(
            model=more.pop("model_spec", ModelSpec(attack=attack, width=16)),
            method=method,
            draw=draw,
            seed=draw,
            **spec,
        )
        values = {
            "status": "done",
            "before": {"ca": 92.0, "asr": 100.0, "ra": 0.0},
            "after": {"ca": ca, "asr": asr, "ra": 80.0},
            "seconds": 10.0,
        }
        return Record(key=experiment.key, experiment=experiment, **{**values, **more})

    return make
