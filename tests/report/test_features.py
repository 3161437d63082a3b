"""Feature maps leave the model as it was, whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.layers import default_layers
from reprune.models.resnet import resnet18
from reprune.report import feature_maps


def plain() -> Classifier:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Flatten(),
        nn.Linear(6 * 64, 3),
    )
    return Classifier(network, [0.5] * 3, [0.25] * 3, num_classes=3)


def state(model: Classifier) -> tuple[dict[str, Tensor], list[bool], list[int]]:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def check_same(before: tuple[dict[str, Tensor], list[bool], list[int]], model: Classifier) -> None:
    after = state(model)
    assert after[1:] == before[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def test_maps_are_the_mean_absolute_activation() -> None:
    model = plain()
    images = torch.rand(5, 3, 8, 8)
    maps = feature_maps(model, images, ["1", "3"])
    model.eval()
    first, second = (model.network.get_submodule(name) for name in ("0", "1"))
    norm = second(first(model.normalize(images)))
    torch.testing.assert_close(maps["1"], norm.abs().mean(1).detach())
    assert maps["3"].shape == (5, 8, 8)
    assert not maps["3"].requires_grad


def test_the_model_is_left_as_it_was() -> None:
    model = plain()
    model.train()
    model.network.get_submodule("1").eval()
    before = state(model)
    images = torch.rand(2, 3, 8, 8)
    feature_maps(model, images, ["0"])
    default_layers(model, images)
    check_same(before, model)


def test_the_model_is_left_as_it_was_when_forward_raises() -> None:
    model = plain()
    model.train()
    before = state(model)
    for call in (lambda x: feature_maps(model, x, ["0", "3"]), lambda x: default_layers(model, x)):
        with pytest.raises(RuntimeError):
            call(torch.rand(2, 3, 9, 9))
        check_same(before, model)


@pytest.mark.parametrize(
    ("layers", "message"), [(["9"], "no layer"), (["4"], r"gives \(2, 384\)"), (["0", "x"], "x")]
)
def test_layers_without_maps_are_refused(layers: list[str], message: str) -> None:
    model = plain()
    before = state(model)
    with pytest.raises(ConfigurationError, match=message):
        feature_maps(model, torch.rand(2, 3, 8, 8), layers)
    check_same(before, model)


def test_default_layers_are_the_stages() -> None:
    model = Classifier(resnet18(width=4), num_classes=10)
    names = default_layers(model, torch.rand(1, 3, 32, 32))
    assert names == ("layer1", "layer2", "layer3", "layer4")
    assert feature_maps(model, torch.rand(1, 3, 32, 32), names)["layer4"].shape == (1, 4, 4)


def test_default_layers_without_stages_are_spread() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert default_layers(plain(), images) == ("0", "1", "2", "3")
    assert default_layers(plain(), images, count=2) == ("1", "3")
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), num_classes=3)
    assert default_layers(flat, images) == ()
