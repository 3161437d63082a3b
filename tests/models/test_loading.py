"""`load_model`: where each fact comes from, what is refused, and that a stranger's code waits."""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, ModelError, UnknownNameError, WeightsError
from reprune.models import LoadedModel, build_network, load_model, save_weights

SHARED = Path(
    os.environ.get("REPRUNE_SHARED", Path(__file__).resolve().parents[2].parent / "shared")
)
PUBLISHED = (
    "ibau_cifar10_badnets",
    "ibau_cifar10_l0_inv",
    "ibau_cifar10_trojan_wm",
    "ibau_gtsrb_badnets",
    "ibau_gtsrb_trojan_sq",
)
MODEL_PY = """
import torch.nn as nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        for i in range(2):
            setattr(self, f"layer{i}", nn.Linear(12, 12))
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        x = x.flatten(1)
        for i in range(2):
            x = getattr(self, f"layer{i}")(x)
        return self.head(x)

def build(num_classes=10):
    return Net(num_classes)
"""


def folder(path: Path, card: dict[str, Any] | None = None, **args: Any) -> nn.Module:
    """A model folder holding a narrow ResNet-18 of 4 classes; returns the network."""
    path.mkdir(exist_ok=True)
    network = build_network("resnet18", 4, width=4, **args)
    save_weights(network, path / "model.safetensors")
    card = {"arch": "resnet18", "arch_args": {"width": 4}} if card is None else card
    (path / "card.json").write_text(json.dumps(card))
    return network


def folder_with_code(path: Path, code: str = MODEL_PY, card: str = "{}") -> nn.Module:
    """A model folder whose architecture is `model.py`; returns the network of `MODEL_PY`."""
    (path / "model.py").write_text(MODEL_PY)
    network = build_network(f"{path / 'model.py'}:build", 3)
    save_weights(network, path / "model.safetensors")
    (path / "model.py").write_text(code)
    (path / "card.json").write_text(card)
    return network


def test_a_folder_with_a_built_in_architecture(tmp_path: Path) -> None:
    card = {
        "arch": "resnet18",
        "arch_args": {"width": 4},
        "num_classes": 4,
        "preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 1, 2]},
        "input_shape": [3, 32, 32],
        "class_names": ["a", "b", "c", "d"],
        "target_label": 2,
        "arch_notes": {"x": 1},
    }
    network = folder(tmp_path, card)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, LoadedModel)
    assert loaded.arch == "resnet18"
    assert loaded.weights_path == tmp_path / "model.safetensors"
    data = loaded.weights_path.read_bytes()
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()
    assert set(loaded.keys) == set(network.state_dict())
    assert not any(module.training for module in loaded.classifier.modules())
    x = torch.rand(2, 3, 32, 32)
    expected = Classifier(network, (0.1, 0.2, 0.3), (0.5, 1, 2), num_classes=4).eval()
    assert torch.equal(loaded.classifier(x), expected(x))
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.classifier.network.state_dict()[key], value), key


def test_the_attackers_target_is_only_in_extra(tmp_path: Path) -> None:
    folder(tmp_path, {"arch": "resnet18", "arch_args": {"width": 4}, "target_label": 3, "ASR": 9})
    card = load_model(tmp_path).card
    assert card.extra == {"target_label": 3, "ASR": 9}
    assert not hasattr(card, "target_label")
    assert "target" not in repr(card)


def test_a_weights_file_uses_its_neighbours(tmp_path: Path) -> None:
    folder(tmp_path)
    assert load_model(str(tmp_path / "model.safetensors")).arch == "resnet18"


def test_a_weights_file_alone(tmp_path: Path) -> None:
    network = folder(tmp_path)
    (tmp_path / "card.json").unlink()
    loaded = load_model(tmp_path / "model.safetensors", arch="resnet18", arch_args={"width": 4})
    assert loaded.classifier.num_classes == 4
    assert loaded.notes == (
        "no preprocessing given: the network takes pixels as they are",
        "number of classes read off the last layer: 4",
    )
    torch.save({"net": network.state_dict(), "acc": 84.5}, tmp_path / "other.pth")
    again = load_model(tmp_path / "other.pth", arch="resnet18", arch_args={"width": 4})
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.classifier(x), loaded.classifier(x))
    assert list(again.keys) == list(network.state_dict())


def test_half_precision_weights(tmp_path: Path) -> None:
    network = folder(tmp_path).half()
    save_weights(network, tmp_path / "model.safetensors")
    classifier = load_model(tmp_path).classifier
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert torch.equal(classifier.network.conv1.weight, network.conv1.weight.float())


def test_which_weights_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no weights; expected model\.safetensors"):
        load_model(tmp_path)
    network = folder(tmp_path)
    torch.save(network.state_dict(), tmp_path / "b.pt")
    assert load_model(tmp_path).weights_path.name == "model.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"several weights files: a\.safetensors, b\.pt"):
        load_model(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    assert load_model(tmp_path).weights_path.name == "b.pt"
    with pytest.raises(WeightsError, match="no file or folder"):
        load_model(tmp_path / "absent")


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    folder(tmp_path)
    before = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_given_beats_the_card(tmp_path: Path) -> None:
    folder(tmp_path, {"arch": "vgg16", "preprocessing": "scaled to -1..1", "num_classes": 9})
    loaded = load_model(
        tmp_path, arch="resnet18", arch_args={"width": 4}, num_classes=4, mean=[0.5], std=[0.5]
    )
    assert loaded.classifier.normalizes
    assert loaded.classifier.num_classes == 4


def test_the_cards_arguments_stay_with_its_architecture(tmp_path: Path) -> None:
    folder(tmp_path)
    assert load_model(tmp_path, arch="resnet18").arch == "resnet18"
    with pytest.raises(WeightsError, match=r"expected \(64, 3, 3, 3\), got \(4, 3, 3, 3\)"):
        load_model(tmp_path, arch="resnet34")


def test_wrong_number_of_classes_shows_both_shapes(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(WeightsError, match=r"linear\.weight: expected \(9, 32\), got \(4, 32\)"):
        load_model(tmp_path, num_classes=9)
    with pytest.raises(ConfigurationError, match="at least 2 classes, got 1"):
        load_model(tmp_path, num_classes=1)


def test_preprocessing_in_words(tmp_path: Path) -> None:
    card = {"arch": "resnet18", "arch_args": {"width": 4}}
    folder(tmp_path, {**card, "preprocessing": "RGB in [0,1], No mean/std normalisation"})
    loaded = load_model(tmp_path)
    assert not loaded.classifier.normalizes
    assert any("No mean/std normalisation" in note for note in loaded.notes)
    folder(tmp_path, {**card, "preprocessing": "ImageNet statistics"})
    with pytest.raises(ModelError, match=r"'ImageNet statistics'.*--mean and --std"):
        load_model(tmp_path)
    assert load_model(tmp_path, mean=(0.5,), std=(0.2,)).classifier.normalizes
    with pytest.raises(ConfigurationError, match="--mean and --std, or neither"):
        load_model(tmp_path, mean=(0.5,))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("{", "not a readable JSON file"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"num_classes": "ten"}', r"num_classes: .*integer.*got 'ten'"),
        ('{"num_classes": 1}', r"num_classes: .*greater than or equal to 2"),
        ('{"num_classes": true}', r"num_classes: .*integer"),
        ('{"arch": 3}', r"arch: .*string, got 3"),
        ('{"arch_args": [1]}', r"arch_args: .*dictionary"),
        ('{"input_shape": [3, 32]}', r"input_shape"),
        ('{"input_shape": [3, 0, 32]}', r"input_shape\.1: .*greater than 0"),
        ('{"class_names": ["a", 2]}', r"class_names\.1: .*string"),
        ('{"preprocessing": {"mean": [0.5]}}', r"preprocessing\.Normalization\.std: .*required"),
        ('{"preprocessing": {"mean": [0.5], "std": [0]}}', r"std\.0: .*greater than 0"),
        ('{"preprocessing": {"mean": [NaN], "std": [1]}}', r"mean\.0: .*finite"),
        ('{"preprocessing": {"mean": [0, 0], "std": [1]}}', r"one mean and one std for each of 2"),
        ('{"num_classes": 3, "class_names": ["a"]}', r"num_classes = 3 but class_names has 1"),
    ],
)
def test_bad_cards_name_file_and_field(tmp_path: Path, card: str, expected: str) -> None:
    folder(tmp_path)
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(ModelError, match=expected) as error:
        load_model(tmp_path)
    assert str(tmp_path / "card.json") in str(error.value)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    folder(tmp_path, {"arch": "our own ResNet"})
    with pytest.raises(ModelError, match=r"'our own ResNet'.*no model\.py.*resnet18, resnet34"):
        load_model(tmp_path)
    folder(tmp_path, {})
    with pytest.raises(ModelError, match=r"no card names one.*--arch"):
        load_model(tmp_path)
    with pytest.raises(UnknownNameError, match="resnet19"):
        load_model(tmp_path, arch="resnet19")


def test_the_cards_shape_is_tried_out(tmp_path: Path) -> None:
    folder(tmp_path, {"arch": "resnet18", "arch_args": {"width": 4}, "input_shape": [1, 32, 32]})
    with pytest.raises(ModelError, match=r"resnet18 fails on an image of .* \(1, 32, 32\)"):
        load_model(tmp_path)


def test_the_cards_arguments_cannot_load_other_weights(tmp_path: Path) -> None:
    card = {"arch": "timm:resnet18", "arch_args": {"checkpoint_path": "evil.pt"}}
    folder(tmp_path, card)
    with pytest.raises(ConfigurationError, match="checkpoint_path would load other weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("arch", ["timm:resnet10t", "torchvision:shufflenet_v2_x0_5"])
def test_library_architectures(tmp_path: Path, arch: str) -> None:
    pytest.importorskip(arch.split(":")[0])
    network = build_network(arch, 5)
    save_weights(network, tmp_path / "model.safetensors")
    (tmp_path / "card.json").write_text(json.dumps({"arch": arch}))
    loaded = load_model(tmp_path)
    assert loaded.classifier.num_classes == 5
    assert not loaded.classifier.normalizes
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.classifier(x), network.eval()(x))


def test_model_py(tmp_path: Path) -> None:
    network = folder_with_code(tmp_path, card='{"arch": "two linear layers", "num_classes": 3}')
    loaded = load_model(tmp_path)
    assert loaded.arch == f"{tmp_path / 'model.py'}:build"
    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(loaded.classifier(x), network(x))
    assert not (tmp_path / "__pycache__").exists()
    loaded.classifier.clone()


EVIL = [
    "import os",
    "import torch, subprocess",
    "from os import system",
    "from torch import os",
    "import torch.hub",
    "import torch.utils.cpp_extension",
    "from torch.serialization import *",
    "from . import neighbour",
    "exec('1')",
    "x = eval",
    "open('f')",
    "compile('1', '', 'exec')",
    "__import__('os')",
    "y = torch.os.system('ls')",
    "torch.load('x')",
    "z = ().__class__.__bases__",
    "z = build.__globals__",
    "__builtins__",
    "g = getattr",
    "getattr(torch, 'o' + 's')",
    "getattr(torch, '__loader__')",
    "getattr(torch, 'os')",
    "(lambda f=getattr: f)()",
    "[getattr][0]",
]


@pytest.mark.parametrize("line", EVIL)
def test_the_tripwire_stops_before_anything_runs(tmp_path: Path, line: str) -> None:
    marker = tmp_path / "ran"
    spy = f"import torch\nfrom pathlib import Path\nPath({str(marker)!r}).mkdir()\n"
    folder_with_code(tmp_path, f"{spy}\n{MODEL_PY}\n{line}\n")
    with pytest.raises(ModelError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert "line 2: from pathlib import Path" in message
    number = (tmp_path / "model.py").read_text().splitlines().index(line) + 1
    assert f"line {number}: {line}" in message
    assert f"--arch {tmp_path / 'model.py'}:build" in message
    assert not marker.exists()


def test_code_named_by_the_user_runs_unchecked(tmp_path: Path) -> None:
    network = folder_with_code(tmp_path, "import os\n" + MODEL_PY)
    for arch in ("model.py:build", f"{tmp_path / 'model.py'}:build"):
        loaded = load_model(tmp_path, arch=arch)
        assert torch.equal(loaded.classifier.network.head.weight, network.head.weight)
        assert loaded.arch == f"{tmp_path / 'model.py'}:build"


def test_code_is_not_run_when_the_card_names_an_architecture(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "model.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_cached_bytecode_is_not_run(tmp_path: Path) -> None:
    marker, code = tmp_path / "ran", tmp_path / "model.py"
    folder_with_code(tmp_path)
    code.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    assert py_compile.compile(str(code), invalidation_mode=mode)
    code.write_text(MODEL_PY)
    load_model(tmp_path)
    assert not marker.exists()


def test_a_card_may_only_name_the_model_py_beside_it(tmp_path: Path) -> None:
    folder_with_code(tmp_path, MODEL_PY.replace("build", "make"), '{"arch": "model.py:make"}')
    assert load_model(tmp_path).arch.endswith("model.py:make")
    (tmp_path / "card.json").write_text('{"arch": "../other.py:build"}')
    with pytest.raises(ModelError, match=r"names the file \.\./other\.py; only model\.py beside"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_load(name: str) -> None:
    path = SHARED / "models" / name
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set REPRUNE_SHARED to the folder that holds models/")
    loaded = load_model(path)
    assert loaded.classifier.num_classes == (43 if "gtsrb" in name else 10)
    assert sum(p.numel() for p in loaded.classifier.parameters()) == loaded.card.extra["params"]
    with torch.inference_mode():
        logits = loaded.classifier(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, loaded.classifier.num_classes)
    assert "target_label" in loaded.card.extra


@pytest.mark.parametrize("prefix", ["model.", "1.", "module.model."])
def test_what_stands_before_every_name_is_taken_off(tmp_path: Path, prefix: str) -> None:
    network = folder(tmp_path / "m")
    weights = {prefix + key: value for key, value in network.state_dict().items()}
    (tmp_path / "m" / "model.safetensors").unlink()
    counted = {"n_averaged": torch.tensor(3), f"{prefix}conv1.total_ops": torch.zeros(1)}
    torch.save({"state_dict": weights | counted}, tmp_path / "m" / "last.ckpt")
    loaded = load_model(tmp_path / "m")
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.classifier(pixels), network.eval()(pixels))
    assert loaded.prefix == prefix
    assert any("was taken off the names" in note for note in loaded.notes)


def test_a_normalisation_beside_the_network_is_not_dropped(tmp_path: Path) -> None:
    network = folder(tmp_path / "m")
    weights = {"1." + key: value for key, value in network.state_dict().items()}
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(weights | {"0.mean": torch.zeros(3)}, tmp_path / "m" / "model.pt")
    with pytest.raises(WeightsError, match=r"with '1\.' before .*: 0\.mean\. If they are those"):
        load_model(tmp_path / "m")


def test_statistics_of_bytes_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "m")
    with pytest.raises(ConfigurationError, match="got a mean of 125; divide both by 255"):
        load_model(tmp_path / "m", mean=(125, 123, 114), std=(63, 62, 66))


def test_a_folder_with_a_checkpoint_of_a_rare_name(tmp_path: Path) -> None:
    network = folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "m" / "checkpoint.pth.tar")
    assert load_model(tmp_path / "m").weights_path.name == "checkpoint.pth.tar"
