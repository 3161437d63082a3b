"""Networks as people write them: what works on them, and what is refused by an error of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from quick import QUICK
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.detection.filters import make_filter
from reprune.errors import DataError, ModelError
from reprune.evaluation import evaluate
from reprune.training import Training

CLEAN = planted.stripes(80, seed=3)


class Flattening(nn.Module):
    """Its maps are flattened by `view`, which fails where channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(256, 4)

    def maps(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maps(x).view(len(x), -1))


class Auxiliary(Flattening):
    """Two heads while it trains, as Inception has."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Named(Flattening):
    """Its layers are called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.second(input=self.first(input=x).relu()).relu()
        return self.head(input=maps.flatten(1))


class Precise(Flattening):
    """Its weights are of another type, and it casts its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight)).float()


class Deep(Flattening):
    """Its first weight has five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, stride=(1, 2, 2), padding=(0, 1, 1))

    def maps(self, x: Tensor) -> Tensor:
        return self.second(self.first(x[:, None])[:, :, 0].relu()).relu()


class Shut(Flattening):
    """No gradient comes through."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@cache
def weights(kind: type[Flattening]) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(kind(), (0.5,) * 3, (0.25,) * 3, num_classes=4)
    training = Training(epochs=4, batch_size=32, lr=0.05, padding=0, mirror=False)
    training.run(model, planted.stripes(800, seed=1), generator=generator())
    return model.network.state_dict()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(kind: type[Flattening], dtype: torch.dtype = torch.float32) -> Classifier:
    network = kind()
    network.load_state_dict(weights(Flattening if kind is Shut else kind))
    return Classifier(network.to(dtype), (0.5,) * 3, (0.25,) * 3, num_classes=4).eval()


@pytest.mark.parametrize("method", ["auto", "default", "anp", "nc+abl"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Flattening, torch.float32),
        (Auxiliary, torch.float32),
        (Named, torch.float32),
        (Precise, torch.float64),
        (Precise, torch.bfloat16),
        (Deep, torch.float32),
    ],
)
def test_methods_take_it(kind, dtype, method) -> None:
    model = made(kind, dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert evaluate(model, CLEAN).ca.share > 0.8
    result = QUICK[method](model, CLEAN, generator=generator())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.isfinite(result.model(CLEAN.pixels())).all()


@pytest.mark.parametrize("method", ["auto", "default", "ft", "nc+ft"])
def test_a_network_without_gradient_is_refused(method) -> None:
    with pytest.raises(ModelError, match="no gradient passes"):
        QUICK[method](made(Shut), CLEAN, generator=generator())


def test_it_can_be_examined_without_gradient() -> None:
    assert evaluate(made(Shut), CLEAN).ca.share > 0.8


def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(made(Flattening).network, torch.rand(2, 3, 16, 16))
    model = Classifier(traced, (0.5,) * 3, (0.25,) * 3, num_classes=4)
    with pytest.raises(ModelError, match="TorchScript"):
        QUICK["ft"](model, CLEAN, generator=generator())


def test_weights_of_inference_mode_are_refused_and_left_alone() -> None:
    with torch.inference_mode():
        model = made(Flattening)
    with pytest.raises(ModelError, match="inference_mode"):
        QUICK["nc+ft"](model, CLEAN, generator=generator())
    assert all(p.requires_grad for p in model.parameters())


def test_the_layout_is_found_once_and_kept() -> None:
    model = made(Flattening)
    assert model.layout is None
    evaluate(model, CLEAN)
    assert model.layout == model.clone().layout == torch.contiguous_format
    common = planted.model(False).clone()
    common.settle(CLEAN.pixels(slice(0, 2)))
    assert common.layout == torch.channels_last


def test_a_layer_whose_training_crashes_with_channels_last_has_them_first() -> None:
    """oneDNN issue 6035: a strided 1x1 convolution of fewer than eight channels."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1, stride=2), nn.Flatten(), nn.Linear(8 * 49, 4)
    )
    model = Classifier(network, num_classes=4)
    training = Training(epochs=1, batch_size=32, lr=0.01, padding=0, mirror=False)
    training.run(model, CLEAN, generator=generator())
    assert model.layout == torch.contiguous_format


def test_what_was_compiled_is_unwrapped() -> None:
    network = made(Flattening).network
    assert Classifier(torch.compile(network), num_classes=4).network is network


def test_a_filter_needs_images() -> None:
    with pytest.raises(DataError, match="no images to examine"):
        make_filter("strip")(made(Flattening), CLEAN.subset([]), CLEAN, generator=generator())
