"""Bad input: a message that names what came and what to do, exit status 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import planted
from reprune.attacks import write_trigger
from reprune.data import ImageSet
from reprune.defenses import DEFENSES
from reprune.detection import DETECTORS, Inversion, Scan, UnlearnedLabel
from reprune.rnp import RNP, Unlearning

from .conftest import Files, Reprune, write_npz

WRITERS = ("purify", "scan")
BRIEF = Scan(
    cleanse=replace(Scan().cleanse, inversion=Inversion(steps=2)),
    margins=None,
    waves=None,
    joint=None,
)
"""For what happens in its unlearning."""


@pytest.fixture
def refused(files: Files, reprune: Reprune, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail cleanly; returns its message on one line."""

    def run(
        command: str = "scan",
        *options: object,
        model: Path | None = None,
        data: Path | None = None,
    ) -> str:
        output = tmp_path / "outputs" / "out"
        output.parent.mkdir(exist_ok=True)
        where = () if command == "evaluate" else ("--output", output)
        if command == "purify" and "--method" not in options:
            options = ("--method", "rnp", *options)  # auto goes on where unlearning fails
        arguments = (model or files.backdoored, "--data", data or files.npz, *where, *options)
        outcome = reprune(command, *arguments)
        assert outcome.status == 2
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert "Traceback" not in outcome.err
        assert os.listdir(output.parent) == []
        return outcome.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return planted.write_model(tmp_path / "model")


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes images as `.npz`; by default 100 good ones."""

    def write(images: Tensor | None = None, labels: Tensor | None = None) -> Path:
        data = planted.stripes(100, seed=1)
        images = data.images if images is None else images
        labels = data.labels if labels is None else labels
        return write_npz(tmp_path / "data.npz", ImageSet(images, labels))

    return write


# --- weights -------------------------------------------------------------------------------


def test_weight_keys_that_do_not_fit_are_listed(refused, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["head.weight"] = weights.pop("11.weight")
    weights["0.weight"] = weights["0.weight"][:8].clone()
    save_file(weights, path)
    message = refused(model=folder)
    assert f"the weights in {path} do not fit Sequential" in message
    assert "1 missing: 11.weight" in message
    assert "1 unexpected: head.weight" in message
    assert "0.weight: expected (16, 3, 3, 3), got (8, 3, 3, 3)" in message
    assert "Check the architecture" in message


@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_a_truncated_file(command, refused, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    message = refused(command, model=folder)
    assert "(200 bytes) is not a usable .safetensors weights file: it is truncated" in message


@pytest.mark.parametrize("content", [b"", b"\x00" * 200, b"<html>", b"\xff" * 200])
def test_a_file_of_something_else(content, refused, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert "is not a usable .safetensors weights file" in refused(model=folder)


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_not_unpickled(refused, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Bomb(tmp_path / "exploded")}, folder / "model.pt")
    message = refused(model=folder)
    assert not (tmp_path / "exploded").exists()
    assert re.search(r"its pickle asks for (os|posix|nt)\.mkdir", message)
    assert "safetensors.torch.save_file(model.state_dict()" in message


def test_a_pickled_module_is_told_how_to_convert(refused, folder):
    (folder / "model.safetensors").unlink()
    torch.save(planted.model(backdoored=True).network, folder / "model.pt")
    message = refused(model=folder)
    assert re.search(r"its pickle asks for .*torch\.nn\.modules", message)
    assert "convert it in an isolated environment" in message


def test_weights_with_nan(refused, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["3.weight"][0] = float("nan")
    save_file(weights, path)
    assert "holds NaN or infinite numbers in 3.weight" in refused(model=folder)


@pytest.mark.parametrize("make", [None, Path.mkdir])
def test_no_model(make, refused, tmp_path):
    path = tmp_path / "absent"
    if make:
        make(path)
    message = refused(model=path)
    assert ("holds no weights" if make else "there is no file or folder") in message


def test_a_folder_without_an_architecture(refused, folder):
    (folder / "model.py").unlink()
    assert "Give --arch with one of resnet18" in refused(model=folder)


def test_a_suspicious_model_py_is_not_run(refused, folder, tmp_path):
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n"
    (folder / "model.py").write_text(code + planted.MODEL_PY)
    message = refused(model=folder)
    assert not (tmp_path / "exploded").exists()
    assert "does more than define a network, so it was not run" in message
    assert "line 1: import os" in message


# --- images --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_labels_outside_the_classes(command, refused, npz):
    labels = torch.arange(100) % 6
    message = refused(command, data=npz(labels=labels))
    assert "labels go up to 5 but there are 4 class names; expected labels in 0..3" in message


@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_labels_outside_the_classes_of_a_model_without_names(command, refused, npz, tmp_path):
    model = planted.write_model(tmp_path / "nameless", class_names=None)
    message = refused(command, data=npz(labels=torch.arange(100) % 6), model=model)
    assert "the model has 4 classes, labels 0..3, but the data has the labels 4, 5" in message


@pytest.mark.parametrize("command", WRITERS)
def test_too_few_images(command, refused, npz):
    data = planted.stripes(20, seed=1)
    message = refused(command, data=npz(data.images, data.labels))
    assert "too few images: got 20, at least 50 are needed for 4 classes" in message


def test_too_few_images_drawn(refused):
    message = refused("scan", "--samples", 30)
    assert "of the 30 images drawn with --samples: too few images: got 30, at least 50" in message


@pytest.mark.parametrize("command", WRITERS)
def test_a_class_without_images(command, refused, npz):
    data = planted.stripes(100, seed=1)
    data = data.subset((data.labels != 3).nonzero().flatten())
    assert "1 of 4 classes have no image: 3" in refused(command, data=npz(data.images, data.labels))


@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_images_of_other_channels(command, refused, npz, tmp_path):
    grey = npz(planted.stripes(100, seed=1).images[:, :1])
    assert "holds images of 1 channels, but the model's mean and std are for 3" in refused(
        command, data=grey
    )
    plain = planted.write_model(tmp_path / "plain", preprocessing={"mean": [0.5], "std": [0.25]})
    message = refused(command, data=grey, model=plain)
    assert "the model takes images of (channels, height, width) (3, 16, 16), got (1, 16, 16)" in (
        message
    )
    silent = planted.write_model(
        tmp_path / "silent", preprocessing={"mean": [0.5], "std": [0.25]}, input_shape=None
    )
    message = refused(command, data=grey, model=silent)
    assert "the model fails on images of (channels, height, width) (1, 16, 16)" in message


@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_images_of_another_size(command, refused, npz):
    images = planted.stripes(100, seed=1).images.repeat(1, 1, 2, 2)
    message = refused(command, data=npz(images))
    assert "(3, 16, 16), got (3, 32, 32); pass size=(16, 16) or --image-size" in message


def test_images_of_several_sizes(refused, files, tmp_path):
    from PIL import Image

    for label, name in enumerate(planted.NAMES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16 + label)).save(tmp_path / "pictures" / name / "0.png")
    message = refused(data=tmp_path / "pictures")
    assert "all images must have one size (height x width), got several" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda x: x.index_fill_(0, torch.tensor([7]), float("nan")),
            "1 of 100 images hold pixels",
        ),
        (lambda x: x * 255, "float images must lie in [0, 1], got pixels from 0 to"),
        (lambda x: (x - 0.5) / 0.25, "undo the normalisation: mean and std belong to the model"),
        (lambda x: x.index_fill_(0, torch.arange(9), 0.5), "9 of 100 images are a single colour"),
    ],
)
@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_pixels_that_cannot_be(command, change, expected, refused, npz):
    images = change(planted.stripes(100, seed=1).pixels())
    assert expected in refused(command, data=npz(images))


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".png", ""])
def test_data_that_is_no_data(suffix, refused, tmp_path):
    path = tmp_path / f"data{suffix}"
    assert "no such file or folder" in refused(data=path)
    path.write_bytes(b"PK\x03\x04 and then nothing")
    message = refused(data=path)
    assert "it is damaged" in message or "expected a folder of class folders" in message


# --- the model on the data -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), None])
@pytest.mark.parametrize(
    ("ending", "came"),
    [
        ("nn.Unflatten(1, (2, 2))", "(100, 2, 2)"),
        ("nn.Linear(4, 7)", "(100, 7)"),
        ("nn.Flatten(0)", "(400,)"),
    ],
)
def test_outputs_that_are_not_logits(shape, ending, came, refused, folder, npz, tmp_path):
    body = planted.MODEL_PY.replace("num_classes),\n", f"num_classes), {ending},\n", 1)
    assert body != planted.MODEL_PY
    (folder / "model.py").write_text(body)
    (folder / "card.json").write_text(json.dumps(planted.CARD | {"input_shape": shape}))
    scope: dict[str, Callable[[int], nn.Module]] = {}
    exec(body, scope)
    network = scope["build"](4)
    save_file(dict(network.state_dict()), folder / "model.safetensors")
    message = refused(model=folder, data=npz())
    if shape:
        one = came.replace("(100", "(1").replace("(400", "(4")
        assert f"returned {one} for one image, expected logits (1, 4)" in message
    else:
        assert f"the model must return logits of shape (100, 4), got {came}" in message


def test_probabilities_instead_of_logits(refused, folder):
    body = planted.MODEL_PY.replace("num_classes),\n", "num_classes), nn.Softmax(1),\n", 1)
    (folder / "model.py").write_text(body)
    assert "remove the softmax from the end of the network" in refused(model=folder)


@pytest.mark.parametrize("command", ["purify", "scan", "evaluate"])
def test_a_model_at_chance(command, refused, npz):
    labels = planted.stripes(100, seed=1).labels
    generator = torch.Generator().manual_seed(0)
    message = refused(command, data=npz(labels=labels[torch.randperm(100, generator=generator)]))
    assert "the model is at chance on this data (" in message
    assert "wrong preprocessing (mean/std), class order or labels are the usual causes" in message


def test_wrong_preprocessing_is_named_as_the_usual_cause(refused):
    message = refused("scan", "--mean", "120,120,120", "--std", "60,60,60")
    assert "wrong preprocessing (mean/std)" in message


@pytest.fixture
def unlearning(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how both commands unlearn."""

    def change(**settings: float) -> None:
        changed = replace(Unlearning(), **settings)
        monkeypatch.setitem(DEFENSES, "rnp", lambda: RNP(unlearning=changed))
        monkeypatch.setitem(DETECTORS, "nu", lambda: UnlearnedLabel(unlearning=changed))
        monkeypatch.setitem(DETECTORS, "scan", lambda: replace(BRIEF, unlearning=changed))

    return change


UNLEARNING = {"purify": ("--method", "rnp"), "scan": ("--detector", "nu")}
"""Options with which the commands need an unlearned model."""


@pytest.mark.parametrize("command", WRITERS)
def test_unlearning_that_does_not_converge(command, refused, unlearning):
    unlearning(epochs=2, lr=1e-6)
    message = refused(command, *UNLEARNING[command])
    assert re.search(
        r"unlearning did not converge: accuracy on the defence data is \d+\.\d% after 2 epochs, "
        r"the goal is 27\.\d%; raise the number of epochs or the learning rate",
        message,
    )


@pytest.mark.parametrize("command", WRITERS)
def test_unlearning_that_goes_nan(command, refused, unlearning):
    unlearning(lr=1e30, stop_accuracy=-1.0)
    message = refused(command, *UNLEARNING[command])
    assert "unlearn diverged in epoch 1: the loss is nan; lower the learning rate" in message


def test_a_scan_goes_on_without_unlearned_copies(reprune, unlearning, files, tmp_path):
    unlearning(lr=1e30, stop_accuracy=-1.0)
    where = ("--data", files.npz, "--output", tmp_path / "out")
    outcome = reprune("scan", files.clean, *where)
    assert outcome.status == 4  # never clean
    assert "copies could not be unlearned, so that only triggers speak" in outcome.out


def test_a_network_without_a_channel_to_prune(refused, folder, npz):
    body = (
        "from torch import nn\n\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))\n"
    )
    (folder / "model.py").write_text(body)
    data = planted.stripes(100, seed=1)
    pixels = (data.pixels().flatten(1) - 0.5) / 0.25
    targets = nn.functional.one_hot(data.labels, 4).float()
    weights = torch.linalg.lstsq(pixels, targets).solution.T.contiguous()
    save_file({"1.weight": weights, "1.bias": torch.zeros(4)}, folder / "model.safetensors")
    message = refused("purify", model=folder, data=npz())
    assert re.search("no .*channel", message)


# --- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method", "magic"), "unknown method 'magic'; known methods: auto, auto:low, auto:high"),
        (("--trigger", "t.npz"), "--trigger and --target go together: give both, or neither"),
        (("--target", "1"), "--trigger and --target go together: give both, or neither"),
        (("--trigger", "t.npz", "--target", "1"), "no trigger file at t.npz"),
        (("--mean", "0.5,x"), "--mean takes numbers separated by commas, got '0.5,x'"),
        (("--mean", "0.5"), "mean and std go together: give both --mean and --std"),
        (("--mean", "0.5", "--std", "0"), "std must be positive in every channel, got [0.0]"),
        (("--mean", "1,1", "--std", "1,1"), "fails on an image of the card's input_shape"),
        (("--arch-args", "{"), "--arch-args is not JSON"),
        (("--arch-args", "[1]"), "--arch-args takes a JSON object, got '[1]'"),
        (("--arch", "resnet19"), "did you mean 'resnet18'?"),
        (("--num-classes", "7"), "of the wrong shape or kind"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be used"),
    ],
)
def test_options_that_cannot_work(options, expected, refused):
    assert expected in refused("purify", *options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Missing argument 'MODEL'"),
        (("m",), "Missing option '--data'"),
        (("m", "--data", "d"), "Missing option '--output'"),
        (
            ("m", "--samples", "many"),
            "'--samples': expected a whole number of at least 1, got 'many'",
        ),
        (
            ("m", "--samples", "0.5"),
            "'--samples': expected a whole number of at least 1, got '0.5'",
        ),
        (("m", "--samples", "-5"), "'--samples': expected a whole number of at least 1, got -5"),
        (("m", "--seed", "-1"), "'--seed': expected a whole number of at least 0, got -1"),
        (("m", "--seed", "1" * 30), "at least 0, got 111111111111111111111111111111"),
        (("m", "--target", "-1"), "'--target': expected a whole number of at least 0, got -1"),
        (("m", "--num-classes", "1"), "expected a whole number of at least 2, got 1"),
        (("m", "--image-size", "-4"), "expected a whole number of at least 1, got -4"),
        (("m", "--max-accuracy-drop", "2"), "expected a number from 0 to 1, got 2"),
        (("m", "--max-accuracy-drop", "nan"), "expected a number from 0 to 1, got nan"),
        (("m", "--magic"), "No such option: --magic"),
    ],
)
def test_usage_errors(arguments, expected, reprune):
    outcome = reprune("purify", *arguments)
    assert outcome.status == 2
    assert expected in " ".join(outcome.err.replace("│", " ").split())


def test_an_unknown_command(reprune):
    outcome = reprune("cure")
    assert outcome.status == 2
    assert "No such command 'cure'" in outcome.err


@pytest.mark.parametrize("command", ["purify", "evaluate"])
def test_a_known_trigger_that_cannot_be_evaluated_is_refused_before_the_work(
    command, refused, files, tmp_path, monkeypatch
):
    monkeypatch.setattr("reprune.rnp.method.unlearn", None)
    options = ("--trigger", files.trigger, "--target", 4)
    expected = "a trigger needs a target class in 0..3, got 4"
    assert expected in refused(command, *options)
    write_trigger(replace_size(planted.trigger(), 8), tmp_path / "small.npz")
    expected = "the trigger is made for images of shape (3, 8, 8), got (3, 16, 16)"
    assert expected in refused(command, "--trigger", tmp_path / "small.npz", "--target", 2)


def replace_size(trigger, size):
    return replace(trigger, keep=trigger.keep[:, :size, :size], add=trigger.add[:, :size, :size])


# --- output --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_belongs_to_somebody_else(command, reprune, files, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for output, expected in (
        (tmp_path, "is not empty and was not made by reprune: choose a new or empty folder"),
        (tmp_path / "notes.txt", "is a file; expected a new or empty folder"),
        (tmp_path / "notes.txt" / "out", "cannot write"),
    ):
        outcome = reprune(command, files.backdoored, "--data", files.npz, "--output", output)
        assert outcome.status == 2
        assert expected in outcome.err
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(refused, tmp_path):
    (tmp_path / "outputs").mkdir(mode=0o500)
    assert "no permission to write" in refused()


def test_an_output_without_permission_as_root_sees_it(refused, monkeypatch):
    def denied(self: Path, data: bytes) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", denied)
    assert "no permission to write" in refused()


def spoil(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, fail)


@pytest.mark.parametrize("where", ["pathlib.Path.write_bytes", "pathlib.Path.write_text"])
def test_a_full_disk(where, refused, brief_scan, monkeypatch):
    spoil(monkeypatch, where, OSError(errno.ENOSPC, "No space left on device"))
    assert "error: the disk is full: cannot write" in refused(
        "purify", "--samples", 200, "--method", "clp"
    )


def test_a_full_disk_leaves_the_earlier_output(reprune, files, tmp_path, monkeypatch):
    output = tmp_path / "out"
    arguments = ("scan", files.clean, "--data", files.npz, "--output", output, "--detector", "nu")
    arguments = (*arguments, "--samples", 60)
    assert reprune(*arguments).status in (0, 4)
    before = (output / "report.json").read_bytes()
    spoil(monkeypatch, "reprune.job.render_html", OSError(errno.ENOSPC, "No space left"))
    outcome = reprune(*arguments, "--seed", 1)
    assert outcome.status == 2
    assert "the disk is full" in outcome.err
    assert (output / "report.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory; use fewer --samples or another --device"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory; use fewer --samples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; use fewer"),
        (OSError(errno.EIO, "Input/output error", "disk"), "Input/output error: 'disk'"),
        (KeyboardInterrupt(), "interrupted; nothing was written"),
    ],
)
def test_accidents(error, expected, refused, monkeypatch):
    spoil(monkeypatch, "reprune.detection.unlearned_label.unlearn_neurons", error)
    assert expected in refused("scan", "--detector", "nu")


def test_a_bug_is_not_hidden(reprune, files, tmp_path, monkeypatch):
    spoil(monkeypatch, "reprune.detection.unlearned_label.unlearn_neurons", RuntimeError("a bug"))
    arguments = ("scan", files.clean, "--data", files.npz, "--output", tmp_path / "out")
    with pytest.raises(RuntimeError, match="a bug"):
        reprune(*arguments, "--detector", "nu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "where", ["reprune.detection.unlearned_label.unlearn_neurons", "reprune.job.render_html"]
)
def test_ctrl_c(where, files, tmp_path):
    """A real signal in a real process: while it computes, and while it writes."""
    module, name = where.rsplit(".", 1)
    code = f"""
import importlib, os, signal
from reprune.cli import main
module = importlib.import_module({module!r})
inner = module.{name}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it

def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return inner(*args, **kwargs)

module.{name} = interrupted
main()
"""
    output = tmp_path / "outputs" / "out"
    output.parent.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-c", code, "scan", files.backdoored, "--data", files.npz),
            *("--output", output, "--detector", "nu", "--samples", "60"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: interrupted; nothing was written\n"
    assert done.stdout == ""
    assert os.listdir(output.parent) == []
