"""Answers from kept activations are those of the whole network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.masks import ChannelMask, masked_call
from reprune.models import build_network
from reprune.replay import Replay
from reprune.sites import find_sites


def classifier(arch: str, **options: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(arch, 4, **options)
    return Classifier(network, num_classes=4).eval()


def images(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {"width": 8}),
        ("preactresnet18", {"width": 8}),
        ("vgg16", {"width": 8}),
        ("wrn-16-1", {}),
        ("mobilenetv2", {}),
    ],
)
@pytest.mark.parametrize("position", [0, 5, -3, -1])
def test_the_answers_are_those_of_the_masked_network(arch, options, position):
    model, data = classifier(arch, **options), images()
    sites = find_sites(model, data[:2])
    replay = Replay(model, data, sites[position].layer)
    late = list(sites)[position:] if position else list(sites)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        values = [torch.rand(s.channels, generator=generator).round() for s in late]
        mask = ChannelMask.over(late, values, shift=True)
        with torch.no_grad():
            expected = masked_call(model, mask, data)
        assert torch.allclose(replay(mask), expected, atol=1e-4)
    if position not in (0,):
        assert replay.skipped


def test_nothing_before_the_first_masked_layer_runs_again():
    model, data = classifier("resnet18", width=8), images()
    replay = Replay(model, data, "layer4.0.conv1")
    assert replay.skipped == ("conv1", "bn1", "layer1", "layer2", "layer3")
    ran: list[str] = []
    for name, module in replay.model.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    replay({})
    # A hook of a skipped module still fires, its computation does not; inside them nothing does.
    assert all(name.startswith("layer4") or name == "conv1" for name in ran)


class InPlace(nn.Module):
    """Later code that writes into what earlier modules gave out, and a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x += 1
        x = self.act(self.second(x))
        return self.head(x.mean((2, 3)))


def test_kept_outputs_are_safe_from_later_code():
    torch.manual_seed(0)
    model = Classifier(InPlace(), num_classes=4).eval()
    data = images(5)
    replay = Replay(model, data, "second")
    assert replay.skipped == ("first",)  # the activation runs before and after
    with torch.no_grad():
        expected = model(data)
    for _ in range(3):
        assert torch.allclose(replay({}), expected, atol=1e-6)


class Counting(nn.Module):
    """Gives something else each time it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.inner(x) * self.calls).mean((2, 3))


def test_a_network_that_cannot_be_replayed_is_run_whole():
    torch.manual_seed(0)
    replay = Replay(Classifier(Counting(), num_classes=4), images(4), "head")
    assert replay.skipped == ()
    assert replay({}).shape == (4, 4)


def test_the_callers_model_is_untouched(unchanged):
    model = classifier("resnet18", width=8)
    with unchanged(model):
        Replay(model, images(4), "layer4.0.conv1")({})
    assert not any("forward" in vars(module) for module in model.modules())


class Shared(nn.Module):
    """The first block's normalisation serves the second block, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.late = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x).relu()
        return self.head(self.block[1](self.late(x)).relu().mean((2, 3)))


class Borrowing(nn.Module):
    """An early module that uses a later layer's weights behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(3, 4, 3)
        self.early = Reader(self.late.weight)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)).mean((2, 3)))


class Reader(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weights = [weight]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights[0].sum()


@pytest.mark.parametrize(
    ("network", "first", "masked"),
    [(Shared, "late", "block.1.weight"), (Borrowing, "late", "late.weight")],
)
def test_a_mask_that_reaches_back_is_seen(network, first, masked):
    torch.manual_seed(0)
    model = Classifier(network(), num_classes=4).eval()
    data = images(6)
    mask = {masked: torch.tensor([1.0, 0.0, 1.0, 0.0])}
    replay = Replay(model, data, first, probe=mask)
    with torch.no_grad():
        assert torch.allclose(replay(mask), masked_call(model, mask, data), atol=1e-5)
