"""Weights files: nothing in them runs, damage is named, fitting is strict, saving is exact."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reprune.errors import OutputError, WeightsError
from reprune.models import (
    build_network,
    infer_num_classes,
    load_weights,
    read_weights,
    save_weights,
)
from reprune.models.weights import decode_weights


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(4, 3, generator=generator),
        "a.weight": torch.randn(5, generator=generator),
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key


class Evil:
    """Unpickling one creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("extension", [".pt", ".pth", ".bin", ".ckpt"])
def test_reads_torch_files_in_order(tmp_path: Path, extension: str) -> None:
    torch.save(tensors(), tmp_path / f"m{extension}")
    got = read_weights(tmp_path / f"m{extension}")
    assert_same(got, tensors())
    assert list(got) == list(tensors())


def test_reads_safetensors_and_legacy_torch_files(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "m.safetensors")
    assert_same(read_weights(str(tmp_path / "m.safetensors")), tensors())
    torch.save(OrderedDict(tensors()), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "m.pt"), tensors())


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "network", "net", "weights"]
)
def test_unwraps_nested_checkpoints(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, "acc": 84.5, key: tensors()}, tmp_path / "m.pt")
    assert_same(read_weights(tmp_path / "m.pt"), tensors())


def test_unwraps_the_only_state_dict_whatever_its_name(tmp_path: Path) -> None:
    """With the options and the numbers that training scripts keep beside it."""
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "accuracy": np.float64(84.5),
        "epoch": np.int64(3),
        "optimizerC": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "noise_grid": torch.zeros(1, 2),
    }
    torch.save({"netA": tensors(), **beside}, tmp_path / "m.pt")
    assert_same(read_weights(tmp_path / "m.pt"), tensors())
    torch.save({"netA": tensors(), "netG": tensors(), **beside}, tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=r"several state dicts \(netA, netG\)"):
        read_weights(tmp_path / "m.pt")


def test_the_classifier_of_several_networks_is_taken_and_the_others_named(tmp_path: Path) -> None:
    """As attacks with generators, and averages of weights, are saved."""
    path, others = tmp_path / "m.pth.tar", {"a": torch.zeros(3)}
    for taken, left in (("netC", "netG"), ("state_dict", "state_dict_ema")):
        torch.save({"model": {"name": "resnet18"}, taken: tensors(), left: others}, path)
        assert_same(read_weights(path), tensors())
        assert decode_weights(path.read_bytes(), path).others == (left,)


def test_arrays_and_paths_beside_the_weights_are_harmless(tmp_path: Path) -> None:
    beside = {"bd_train": {"indicator": np.zeros(4)}, "args": argparse.Namespace(out=Path("/a"))}
    torch.save({"model": tensors(), "model_name": "resnet18", **beside}, tmp_path / "m.pt")
    assert_same(read_weights(tmp_path / "m.pt"), tensors())


def test_unwraps_parameters_and_two_levels(tmp_path: Path) -> None:
    inner = {key: nn.Parameter(value) for key, value in tensors().items()}
    torch.save({"model": {"state_dict": inner, "step": 1}}, tmp_path / "m.pt")
    got = read_weights(tmp_path / "m.pt")
    assert_same(got, tensors())
    assert not any(tensor.requires_grad for tensor in got.values())


def test_ambiguous_nesting_and_other_contents(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": tensors(), "state_dict": tensors()}, path)
    with pytest.raises(WeightsError, match=r"several state dicts \(state_dict, model\)"):
        read_weights(path)
    torch.save({**tensors(), "epoch": 3}, path)
    with pytest.raises(WeightsError, match=r"not tensors: epoch \(int\)"):
        read_weights(path)
    torch.save({}, path)
    with pytest.raises(WeightsError, match="it holds nothing"):
        read_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="holds a list, expected a state dict"):
        read_weights(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_strips_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + key: value for key, value in tensors().items()}, tmp_path / "m.pt")
    assert_same(read_weights(tmp_path / "m.pt"), tensors())


def test_keeps_a_prefix_that_only_some_keys_have(tmp_path: Path) -> None:
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "m.pt")
    assert_same(read_weights(tmp_path / "m.pt"), mixed)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_a_malicious_pickle_never_runs(tmp_path: Path, nested: bool, new: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "m.pt"
    content = {**tensors(), "x": Evil(marker)} if nested else Evil(marker)
    torch.save(content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert not marker.exists()
    assert f"{os.mkdir.__module__}.mkdir" in str(error.value)
    assert "safetensors.torch.save_file" in str(error.value)
    torch.load(path, weights_only=False)  # the attack is a real one
    assert marker.exists()


def test_a_bare_malicious_pickle_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in ("m.pt", "m.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(marker)))
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)
    assert not marker.exists()


def test_a_pickled_network_is_explained(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=r"asks for.*torch\.nn\.modules\.linear\.Linear"):
        read_weights(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_torchscript_archive_is_explained(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(WeightsError, match="TorchScript archive, a program") as error:
        read_weights(tmp_path / "m.pt")
    assert "weights_only" not in str(error.value)


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\nsize 12345\n"
)


@pytest.mark.parametrize("extension", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"\(0 bytes\).*empty"),
        (LFS, r"git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>Not found</html>", r"it is text.*DOCTYPE"),
        (bytes(range(1, 255)), r"\(254 bytes\).*damaged"),
        (b"\x03", r"\(1 bytes\).*damaged"),
    ],
)
def test_files_that_are_no_weights(
    tmp_path: Path, extension: str, content: bytes, expected: str
) -> None:
    path = tmp_path / f"m{extension}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=expected) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert extension in str(error.value)


@pytest.mark.parametrize("keep", [4, 50, 200, 300])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    for name in ("m.safetensors", "m.pt"):
        whole, path = tmp_path / f"whole-{name}", tmp_path / name
        if name == "m.pt":
            torch.save(tensors(), whole)
        else:
            save_file({f"layer{i}.weight": torch.ones(20) for i in range(6)}, whole)
        path.write_bytes(whole.read_bytes()[:keep])
        with pytest.raises(WeightsError, match=r"damaged") as error:
            read_weights(path)
        assert f"{path} ({keep} bytes)" in str(error.value)


def test_a_cut_tensor_section(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        read_weights(path)


def test_extensions_that_lie(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"a pickle file under another.*rename it to \*\.pt"):
        read_weights(tmp_path / "m.safetensors")
    save_file(tensors(), tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=r"a safetensors file.*rename it to \*\.safetensors"):
        read_weights(tmp_path / "m.pt")


def test_paths_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights file .*absent\.pt"):
        read_weights(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(WeightsError, match="is a folder, expected a weights file"):
        read_weights(tmp_path / "folder.pt")
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"extension '\.onnx', expected one of \.safetensors"):
        read_weights(tmp_path / "m.onnx")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weights = {f"w{i}": torch.full((2,), value, dtype=dtype) for i in range(12)}
    save_file({**weights, "fine": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"NaN or infinite numbers in .*w1, .* and 2 more") as e:
        read_weights(tmp_path / "m.safetensors")
    assert "fine" not in str(e.value)


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "huge": torch.zeros(1).expand(10**15),
        "meta": torch.ones(2, device="meta"),
    }
    for key, tensor in odd.items():
        torch.save({key: tensor, "fine": torch.ones(1)}, tmp_path / "m.pt")
        with pytest.raises(WeightsError, match=f"plain dense numbers.*{key}"):
            read_weights(tmp_path / "m.pt")


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


def test_strict_loading_lists_every_problem() -> None:
    weights = small().state_dict()
    before = small()
    kept = {key: value.clone() for key, value in before.state_dict().items()}
    del weights["0.bias"]
    weights["extra.weight"] = torch.ones(1)
    weights["3.weight"] = torch.ones(43, 4)
    weights["1.weight"] = torch.ones(4, dtype=torch.int8)
    with pytest.raises(WeightsError) as error:
        load_weights(before, weights, source="some.pt")
    message = str(error.value)
    assert "some.pt do not fit Sequential" in message
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "3.weight: expected (5, 4), got (43, 4)" in message
    assert "1.weight: expected (4,), got (4,) integer" in message
    assert_same(before.state_dict(), kept)  # untouched


def test_long_lists_are_cut() -> None:
    network = build_network("resnet18", 10, width=4)
    total = sum("num_batches_tracked" not in key for key in network.state_dict())
    with pytest.raises(WeightsError, match=f"{total} missing: conv1.* and {total - 10} more"):
        load_weights(network, {}, source="x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_the_networks(dtype: torch.dtype) -> None:
    network = small()
    weights = {key: value.to(dtype) for key, value in small().state_dict().items()}
    load_weights(network, weights, source="x")
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        assert value.dtype is torch.float32
        assert torch.equal(value, weights[key].float())


def test_counters_may_be_missing() -> None:
    weights = small().state_dict()
    del weights["1.num_batches_tracked"]
    network = small()
    load_weights(network, weights, source="x")
    assert torch.equal(network[0].weight, weights["0.weight"])


@pytest.mark.parametrize("arch", ["resnet18", "preactresnet18", "vgg16", "wrn-16-1"])
def test_round_trip_is_bit_identical(tmp_path: Path, arch: str) -> None:
    args = {} if arch.startswith("wrn") else {"width": 4}
    network, twin = (build_network(arch, 10, **args) for _ in range(2))
    network(torch.rand(4, 3, 32, 32))  # statistics that are not the initial ones
    save_weights(network, tmp_path / "m.safetensors", metadata={"made": "here"})
    read = read_weights(tmp_path / "m.safetensors")
    load_weights(twin, read, source="m")
    assert_same(twin.state_dict(), network.state_dict())
    assert_same(read, network.state_dict())
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_saving_shared_and_strided_tensors(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Conv2d(3, 4, 3)})
    network["b"].weight = network["a"].weight
    network["a"].bias.data = torch.arange(6.0)[::2]
    network["c"].to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "m.safetensors")
    assert_same(read_weights(tmp_path / "m.safetensors"), network.state_dict())
    assert network["b"].weight is network["a"].weight


def test_saving_replaces_the_old_file_or_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    first, second = small(), small()
    save_weights(first, path)
    save_weights(second, path)
    assert_same(read_weights(path), second.state_dict())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        save_weights(first, path)
    assert_same(read_weights(path), second.state_dict())
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_saving_to_places_that_do_not_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the weights to"):
        save_weights(small(), tmp_path / "absent" / "m.safetensors")
    with pytest.raises(WeightsError, match=r"written as \.safetensors, got"):
        save_weights(small(), tmp_path / "m.pt")


def test_number_of_classes() -> None:
    def infer(**shapes: tuple[int, ...]) -> int:
        named = {key.replace("__", "."): torch.zeros(s) for key, s in shapes.items()}
        return infer_num_classes(named, source="m.pt")

    assert infer(conv__weight=(4, 3, 3, 3), out__weight=(43, 8)) == 43
    assert infer(blocks__0__weight=(30, 10), head__weight=(7, 10)) == 7
    assert infer(classifier__10__weight=(6, 9), classifier__9__weight=(9, 20)) == 6
    with pytest.raises(WeightsError, match=r"from m\.pt .*--num-classes"):
        infer(conv__weight=(4, 3, 3, 3))
    with pytest.raises(WeightsError, match=r"x\.weight, y\.weight.*--num-classes"):
        infer(x__weight=(4, 3), y__weight=(3, 4))
