"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.training import classification, fit, one_cycle

torch.manual_seed(0)  # networks that are made where a module of tests is read


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same weights, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and published models beside the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared"
    folder = Path(os.environ.get("REPRUNE_SHARED", default))
    if not folder.is_dir():
        pytest.skip("shared data not found: set REPRUNE_SHARED")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _coloured(count: int, seed: int) -> ImageSet:
    """Noise with a bright colour channel, which is the class: 3 classes, 12x12 pixels."""
    labels = torch.arange(count) % 3
    images = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 0.6
    images[torch.arange(count), labels] += 0.3
    return ImageSet(images, labels)


@pytest.fixture(scope="session")
def toy_data() -> ImageSet:
    """90 images that a convolution can tell apart; crop and mirror keep the class."""
    return _coloured(90, seed=1)


@pytest.fixture(scope="session")
def toy_model() -> Classifier:
    """A trained network of two convolutions with norms: 8 and 6 channels. Do not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        )
    model = Classifier(network, (0.5,), (0.25,), num_classes=3).train()
    parameters = list(model.parameters())
    fit(
        classification(model),
        parameters,
        _coloured(300, seed=0),
        optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        epochs=5,
        batch_size=30,
        generator=torch.Generator().manual_seed(0),
        schedule=one_cycle,
    )
    return model.eval().settle(_coloured(2, seed=0).pixels())


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "devices": [parameter.device for parameter in model.parameters()],
        "parameters": [id(parameter) for parameter in model.parameters()],
        "hooks": [
            [list(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = _snapshot(model)
    try:
        yield
    finally:
        after = model.state_dict()
        assert state.keys() == after.keys()
        for name, value in state.items():
            assert torch.equal(value, after[name]), name
        assert before == _snapshot(model)


@pytest.fixture
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """`with unchanged(model):` fails unless weights, modes, gradients and hooks are as before."""
    return _unchanged
