"""Every architecture: published sizes, an independent implementation, shapes and gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reprune.errors import (
    ConfigurationError,
    MissingDependencyError,
    ModelError,
    UnknownNameError,
)
from reprune.models import ARCHITECTURES, build_network

NARROW = {
    "resnet18": {"width": 4},
    "resnet34": {"width": 4},
    "preactresnet18": {"width": 4},
    "vgg16": {"width": 4},
    "vgg19": {"width": 4},
    "mobilenetv2": {"width": 0.25},
    "efficientnetb0": {"width": 0.25},
    "wrn-16-1": {},
    "wrn-10-2": {},
}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("resnet18", 11_173_962),  # the usual CIFAR implementation
        ("preactresnet18", 11_171_146),  # the same, without a final norm
        ("vgg16", 14_728_266),
        ("vgg19", 20_040_522),
        ("mobilenetv2", 2_236_682),  # torchvision's, with 10 classes
        ("efficientnetb0", 4_020_358),  # torchvision's, with 10 classes
        ("wrn-28-10", 36_479_194),  # the paper's 36.5 M
        ("wrn-16-1", 175_066),  # the paper's group widths, projection only where shapes change
    ],
)
def test_parameter_counts_are_the_published_ones(arch: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(build_network(arch, 10)) == count


def test_a_final_norm_adds_its_scale_and_shift() -> None:
    with torch.device("meta"):
        plain, normed = (
            build_network("preactresnet18", 10, final_norm=flag) for flag in (False, True)
        )
    assert parameters(normed) - parameters(plain) == 2 * 512


@pytest.mark.parametrize("arch", NARROW)
def test_forward_shape_and_gradient(arch: str) -> None:
    torch.manual_seed(0)
    network = build_network(arch, 7, **NARROW[arch])
    logits = network(torch.rand(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("arch", NARROW)
@pytest.mark.parametrize("size", [40, 64])
def test_other_image_sizes_work(arch: str, size: int) -> None:
    network = build_network(arch, 4, **NARROW[arch]).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 3, size, size)).shape == (1, 4)


def test_every_registered_architecture_is_tested() -> None:
    assert ARCHITECTURES.keys() - {"wrn-28-10"} <= NARROW.keys()


def same_function(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """Outputs of both after giving `theirs` our strides and our weights, in order."""
    convs = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)]
    for mine, other in zip(*convs, strict=True):
        other.stride = mine.stride
    for module in ours.modules():  # random statistics, so that the norms do something
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    values = list(ours.state_dict().values())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        return ours.eval()(x), theirs.eval()(x)


@pytest.mark.parametrize(
    ("arch", "reference"), [("mobilenetv2", "mobilenet_v2"), ("efficientnetb0", "efficientnet_b0")]
)
def test_same_function_as_torchvision(arch: str, reference: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.get_model(reference, weights=None, num_classes=10)
    got, expected = same_function(build_network(arch, 10), theirs)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [16, 19])
def test_vgg_features_are_torchvisions(depth: int) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    ours = build_network(f"vgg{depth}", 10)
    theirs = models.get_model(f"vgg{depth}_bn", weights=None).features
    got, expected = same_function(ours.features, theirs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unknown_name_lists_the_known_and_suggests() -> None:
    with pytest.raises(UnknownNameError) as error:
        build_network("resnet81", 10)
    message = str(error.value)
    assert "'resnet81'" in message
    assert "did you mean 'resnet18'?" in message
    assert all(name in message for name in ARCHITECTURES)
    assert "timm:NAME" in message


@pytest.mark.parametrize("depth", [4, 15, 18])
def test_impossible_wrn_depth(depth: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"6n \+ 4 \(10, 16, .*got {depth}"):
        build_network(f"wrn-{depth}-2", 10)


def test_impossible_wrn_factor() -> None:
    with pytest.raises(ConfigurationError, match="factor is at least 1, got 0"):
        build_network("wrn-16-0", 10)


def test_wrong_architecture_argument_names_the_right_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"widht.*It takes num_classes, width"):
        build_network("resnet18", 10, widht=16)


@pytest.mark.parametrize("key", ["pretrained", "weights", "checkpoint_path", "weights_backbone"])
def test_arguments_that_would_load_other_weights_are_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} would load other weights"):
        build_network("timm:resnet18", 10, **{key: "evil"})


def test_whether_to_draw_initial_weights_is_no_download() -> None:
    pytest.importorskip("torchvision")
    network = build_network("torchvision:googlenet", 5, init_weights=False, aux_logits=False)
    assert network.fc.out_features == 5
    with pytest.raises(ConfigurationError, match="init_weights_from would load other weights"):
        build_network("torchvision:googlenet", 5, init_weights_from="evil")


def test_timm() -> None:
    pytest.importorskip("timm")
    network = build_network("timm:resnet18", 6, in_chans=1).eval()
    assert network(torch.rand(1, 1, 32, 32)).shape == (1, 6)
    with pytest.raises(UnknownNameError, match=r"no model 'resnet1'.*list_models"):
        build_network("timm:resnet1", 6)
    with pytest.raises(UnknownNameError, match="no model 'hf-hub:someone/model'"):
        build_network("timm:hf-hub:someone/model", 6)


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    network = build_network("torchvision:shufflenet_v2_x0_5", 6).eval()
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 6)
    with pytest.raises(UnknownNameError, match=r"did you mean 'resnet18'.*mobilenet_v2"):
        build_network("torchvision:resnt18", 6)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_missing_library_says_how_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "reprune\[vision\]"'):
        build_network(f"{library}:resnet18", 10)


def test_function_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import os\nfrom torch import nn\n"
        "def build(num_classes, width=2):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12 * width, num_classes))\n"
        "def fixed():\n    return nn.Linear(1, 2)\n"
        "def text():\n    return 'no network'\n"
    )
    assert build_network(f"{file}:build", 5, width=1)[1].weight.shape == (5, 12)
    assert build_network(str(file), 5)[1].weight.shape == (5, 24)
    assert build_network(f"{file}:fixed", 5).out_features == 2
    with pytest.raises(ModelError, match=r"no function 'biuld'; it has build, fixed, text"):
        build_network(f"{file}:biuld", 5)
    with pytest.raises(ModelError, match=r"returned str, expected a torch\.nn\.Module"):
        build_network(f"{file}:text", 5)
    with pytest.raises(ModelError, match=r"build\(num_classes=5, depth=3\) failed: TypeError"):
        build_network(f"{file}:build", 5, depth=3)
    with pytest.raises(ModelError, match="cannot read the architecture's file"):
        build_network(f"{tmp_path / 'absent.py'}:build", 5)


def test_a_failing_file_is_a_model_error(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_package\n")
    with pytest.raises(ModelError, match=r"ModuleNotFoundError.*PYTHONPATH"):
        build_network(f"{file}:build", 5)
