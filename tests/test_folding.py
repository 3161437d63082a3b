"""Batch norms inside of the layers before them: the same answers, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reprune.classifier import Classifier
from reprune.folding import folded
from reprune.models import build_network

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(network: nn.Module) -> nn.Module:
    """With statistics and weights of norms that are not those of a new network."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    network.train()
    for _ in range(3):
        network(torch.randn(8, 3, 32, 32))
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    ("arch", "arguments", "left"),
    [
        ("resnet18", {"width": 8}, 0),
        ("vgg16", {"width": 8}, 0),
        ("preactresnet18", {"width": 8}, 8),  # those whose input is a shortcut, too
        ("mobilenetv2", {"width": 0.25}, 0),
        ("torchvision:densenet121", {"memory_efficient": False}, 62),
    ],
)
def test_answers_and_gradients_are_the_same(arch, arguments, left) -> None:
    if arch.startswith("torchvision"):
        pytest.importorskip("torchvision")
    model = Classifier(
        trained(build_network(arch, 4, **arguments)), (0.5,) * 3, (0.2,) * 3, num_classes=4
    )
    images = IMAGES.clone().requires_grad_(True)
    kept = {name: value.clone() for name, value in model.state_dict().items()}

    def answers(called: Classifier) -> tuple[torch.Tensor, torch.Tensor]:
        logits = called(images)
        return logits, torch.autograd.grad(logits.logsumexp(1).sum(), images)[0]

    wanted = answers(model)
    with folded(model, IMAGES) as still:
        assert norms(still) == left
        for one, other in zip(answers(still), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
        assert not any(parameter.requires_grad for parameter in still.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert norms(model) > left
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])


class Shaped(nn.Module):
    """A convolution and a norm, put together by `how`."""

    def __init__(self, how, *, norm: nn.Module | None = None, conv: nn.Module | None = None):
        super().__init__()
        self.how = how
        self.conv = conv or nn.Conv2d(3, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)
        self.last = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(self.how(self, x).mean((2, 3))))


def folds(network: nn.Module) -> bool:
    model = Classifier(trained(network), num_classes=4)
    with folded(model, IMAGES) as twin:
        torch.testing.assert_close(twin(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
    found = isinstance(twin.network.norm, nn.Identity)
    assert found <= (twin is not model)
    return found


def test_where_a_norm_is_folded() -> None:
    plain = lambda self, x: self.norm(self.conv(x))  # noqa: E731
    assert folds(Shaped(plain))
    assert folds(Shaped(plain, norm=nn.BatchNorm2d(4, affine=False)))
    assert folds(Shaped(lambda self, x: self.norm(self.conv(x)).relu_()))


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "network",
    [
        lambda: Shaped(lambda self, x: self.norm(self.conv(x).relu())),
        lambda: Shaped(lambda self, x: self.norm(self.conv(x).relu_())),
        lambda: Shaped(lambda self, x: self.norm(y := self.conv(x)) + y),
        lambda: Shaped(lambda self, x: self.norm(self.conv(x)) + self.conv(-x)),
        lambda: Shaped(
            lambda self, x: self.norm(self.conv(x)),
            norm=nn.BatchNorm2d(4, track_running_stats=False),
        ),
        lambda: Shaped(lambda self, x: self.norm(self.conv(x)), conv=Doubled(3, 4, 3)),
        lambda: Shaped(
            lambda self, x: self.norm(self.conv(x)),
            conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        ),
    ],
)
def test_where_a_norm_stays(network) -> None:
    assert not folds(network())


def test_a_hook_is_kept() -> None:
    network = Shaped(lambda self, x: self.norm(self.conv(x)))
    network.conv.register_forward_hook(lambda module, args, output: -output)
    assert not folds(network)


def test_a_model_that_cannot_be_copied_is_called_itself() -> None:
    network = trained(Shaped(lambda self, x: self.norm(self.conv(x))))
    network.lock = __import__("threading").Lock()
    model = Classifier(network, num_classes=4)
    with folded(model, IMAGES) as still:
        assert still is model
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
