"""`reprune attack` and `reprune zoo`: what they write, resume, list and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import planted
from reprune.attacks import ATTACKS, read_trigger
from reprune.crafting import read_backdoor
from reprune.models import load_model

from .conftest import write_npz

SMALL = ("--arch", "resnet18", "--width", 8, "--epochs", 6, "--lr", "0.1")
WRITTEN = {"model.safetensors", "card.json", "trigger.npz", "preview.png", ".reprune-files"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """320 training and 100 test images in one folder."""
    root = tmp_path_factory.mktemp("stripes")
    write_npz(root / "train.npz", planted.stripes(320, seed=1))
    write_npz(root / "test.npz", planted.stripes(100, seed=2))
    return root


def read_card(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory, parts) -> Path:
    """A BadNets model made from scratch, stored as float16."""
    import sys

    from reprune.cli import main

    output = tmp_path_factory.mktemp("made") / "badnets"
    arguments = ["attack", "badnets", "--data", parts, *SMALL, "--half", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return output


def test_what_is_written(made, parts):
    assert {path.name for path in made.iterdir()} == WRITTEN
    assert list(made.parent.iterdir()) == [made]  # no checkpoints left
    card = read_card(made)
    assert card["arch"] == "resnet18"
    assert card["arch_args"] == {"width": 8}
    assert card["input_shape"] == [3, 16, 16]
    assert card["num_classes"] == 4
    assert card["regime"] == "scratch"
    parameters = {"target": 0, "rate": 0.1, "all_to_all": False, "size": 3}
    assert card["attack"]["parameters"] == parameters
    assert card["goal"] == {"target": 0, "source": None}
    assert card["images"] == {"source": parts.name, "training": 320, "test": 100}
    assert card["seed"] == 0
    assert card["seconds"] > 0
    assert len(card["training"]["history"]) == 6
    assert set(card["versions"]) >= {"reprune", "torch", "python"}
    assert str(parts) not in (made / "card.json").read_text()
    assert Image.open(made / "preview.png").format == "PNG"


def test_the_model_loads_and_the_card_is_right(made, parts, reprune):
    loaded, card = load_model(made), read_card(made)
    assert loaded.sha256 == card["sha256"]
    outcome = reprune("evaluate", made, "--data", parts / "test.npz", "--trigger", made, "--json")
    measured = outcome.json()
    assert round(100 * measured["ca"]["share"], 2) == card["CA"]
    assert round(100 * measured["asr"]["share"], 2) == card["ASR"]
    assert round(100 * measured["ra"]["share"], 2) == card["RA"]
    weights = loaded.classifier.network.state_dict()
    assert all(
        torch.equal(value, value.half().float())
        for value in weights.values()
        if value.is_floating_point()
    )


def test_the_trigger_is_read_with_its_goal(made):
    known = read_backdoor(made)
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(known.trigger(pixels), read_trigger(made / "trigger.npz")(pixels))
    assert known.goal.target == 0


def test_implanting_into_a_clean_model_with_a_file_of_its_own(files, parts, reprune, tmp_path):
    output = tmp_path / "implanted"
    options = ("--regime", "implant", "--clean-model", files.clean, "--epochs", 12)
    choice = ("--target", 2, "--rate", "0.3", "--set", "size=4", "--lr", "0.2")
    outcome = reprune(
        "attack", "badnets", "--data", parts, *options, *choice, "--output", output, "--json"
    )
    assert outcome.status == 0, outcome.err
    card = read_card(output)
    assert card["regime"] == "implant"
    assert card["arch"] == "model.py:build"
    assert card["clean_model"]["source"] == files.clean.name
    assert card["clean_model"]["sha256"] == load_model(files.clean).sha256
    assert card["attack"]["parameters"]["size"] == 4
    assert card["CA"] > 90
    assert card["ASR"] > 90 > card["clean_model"]["ASR"]
    assert outcome.json()["target"] == 2
    assert load_model(output).card.preprocessing.mean == pytest.approx((0.5, 0.5, 0.5))


def test_implanting_trains_a_clean_model_first(reprune, tmp_path):
    for name, count in (("train", 64), ("test", 40)):
        write_npz(tmp_path / f"{name}.npz", planted.stripes(count, seed=1))
    options = ("--regime", "implant", "--rate", "0.2")
    outcome = reprune(
        "attack", "badnets", "--data", tmp_path, *SMALL, *options, "--output", tmp_path / "made"
    )
    assert outcome.status == 0, outcome.err
    card = read_card(tmp_path / "made")
    assert card["clean_model"]["source"].startswith("trained before")
    assert card["clean_model"]["clean_training"]["epochs"] == 30


def test_a_clean_model_has_no_trigger(parts, reprune, tmp_path):
    outcome = reprune("attack", "clean", "--data", parts, *SMALL, "--output", tmp_path / "made")
    assert outcome.status == 0, outcome.err
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names == {"model.safetensors", "card.json", ".reprune-files"}
    card = read_card(tmp_path / "made")
    assert not {"ASR", "RA", "goal", "trigger"} & card.keys()
    outcome = reprune(
        *("evaluate", tmp_path / "made", "--data", parts / "test.npz"),
        *("--trigger", tmp_path / "made"),
    )
    assert outcome.status == 2
    assert "names no trigger and goal" in outcome.err


def test_a_killed_command_goes_on_where_it_was(made, parts, reprune, tmp_path, monkeypatch):
    from reprune import crafting

    output = tmp_path / "badnets"
    arguments = ("attack", "badnets", "--data", parts, *SMALL, "--half", "--output", output)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crafting, "_round_to_half", killed)
        assert reprune(*arguments).status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["badnets.checkpoints"]
    other = reprune(*arguments, "--rate", "0.2")
    assert other.status == 2
    assert "a run that differs in attack, parameters; delete it" in other.err
    with monkeypatch.context() as patch:  # the training itself is not repeated
        patch.setattr("reprune.training.Augmentation.__call__", killed)
        outcome = reprune(*arguments)
    assert outcome.status == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["badnets"]
    assert read_card(output)["sha256"] == read_card(made)["sha256"]


def test_lists(reprune):
    outcome = reprune("attack", "--list", "--json")
    rows = outcome.json()
    assert list(rows) == list(ATTACKS)
    assert rows["badnets"]["parameters"]["size"] == 3
    text = reprune("attack", "--list").out
    assert all(name in text for name in ATTACKS)
    zoo = reprune("zoo", "list", "--json").json()
    assert {"zoo:clean", "zoo:badnets"} <= {row["model"] for row in zoo}
    assert "zoo:badnets" in reprune("zoo", "list").out


def test_a_preview_without_training(parts, reprune, tmp_path):
    for name in ("badnets", "sig"):
        output = tmp_path / f"{name}.png"
        outcome = reprune("attack", name, "--preview", "--data", parts, "--output", output)
        assert outcome.status == 0, outcome.err
        assert Image.open(output).width > 300


def test_a_preview_of_a_trigger_that_was_made(made, parts, reprune, tmp_path):
    arguments = ("attack", "badnets", "--preview", "--data", parts, "--trigger", made)
    outcome = reprune(*arguments, "--output", tmp_path / "a.png")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "name an attack: one of badnets, "),
        (("badnet",), "unknown attack 'badnet' (did you mean 'badnets'?); known are badnets, "),
        (("badnets",), "--data and --output: needed to make a model"),
        (("badnets", "--data", "x"), "--output: needed to make a model"),
        (("badnets", "--set", "size=5", "--set", "size=4"), "--set size is given twice"),
        (("badnets", "--set", "rate=0.5", "--rate", 1), "--rate and --set rate are the same"),
        (("badnets", "--set", "size"), "--set takes KEY=VALUE, got 'size'"),
        (("badnets", "--set", "alpha=1"), "badnets has no parameter alpha; it has target, rate, "),
        (("badnets", "--set", "size=big"), "badnets: size = 'big': Input should be a valid int"),
        (("clean", "--target", "1"), "clean has no parameter target; it has none"),
    ],
)
def test_usage(arguments, expected, reprune):
    outcome = reprune("attack", *arguments)
    assert outcome.status == 2
    assert expected in outcome.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("badnets", "--set", "size=17"), "a trigger of 17 pixels does not fit 16x16"),
        (("badnets", "--target", "4"), "the target must be a class index in 0..3, got 4"),
        (("badnets", "--rate", "1.5"), "the poisoning rate must lie in (0, 1], got 1.5"),
        (("badnets", "--rate", "0.001"), "poisons none of 320 images; raise the rate"),
        (("sig", "--rate", "0.5"), "asks for 160 of 320 images, but SIG poisons only images of"),
        (("blend", "--set", "alpha=0"), "alpha must lie in (0, 1], got 0"),
        (("badnets", "--image-size", "2"), "a trigger of 3 pixels does not fit 2x2"),
        (("badnets", "--clean-model", "nowhere"), "there is no file or folder nowhere"),
        (("badnets", "--mean", "1,a"), "--mean takes numbers separated by commas, got '1,a'"),
        (("clean", "--preview"), "clean has no trigger"),
    ],
)
def test_bad_input_is_refused_before_training(
    arguments, expected, parts, reprune, tmp_path, monkeypatch
):
    monkeypatch.setattr("reprune.training.fit", None)
    outcome = reprune("attack", *arguments, "--data", parts, "--output", tmp_path / "made.png")
    assert outcome.status == 2
    assert expected in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_refused_before_anything(parts, reprune, tmp_path, monkeypatch):
    monkeypatch.setattr("reprune.cli.attack.read_parts", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("")
    for output in (tmp_path / "file/made", tmp_path / "other"):
        outcome = reprune("attack", "badnets", "--data", parts, "--output", output)
        assert outcome.status == 2, output
        assert str(tmp_path) in outcome.err


NETWORK = """
from torch import nn

def tiny(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes),
    )
"""


def test_an_architecture_from_a_file_comes_along(parts, reprune, tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    options = ("--arch", f"{tmp_path}/net.py:tiny", "--arch-args", '{"width": 6}', "--epochs", 20)
    output = tmp_path / "made"
    outcome = reprune("attack", "badnets", "--data", parts, *options, "--output", output)
    assert outcome.status == 0, outcome.err
    assert read_card(output)["arch"] == "model.py:tiny"
    assert str(tmp_path) not in (output / "card.json").read_text()
    (tmp_path / "net.py").unlink()
    loaded = load_model(output)
    assert loaded.classifier.network[0].out_channels == 6


def test_the_current_folder_as_output(parts, reprune, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = reprune("attack", "badnets", "--data", parts, *SMALL, "--rate", 2, "--output", ".")
    assert "the poisoning rate must lie in (0, 1], got 2.0" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--regime", "implant", "--arch", "vgg16"), "--arch: decided by the clean model"),
        (
            ("--regime", "implant", "--width", 8, "--mean", "0.5", "--schedule", "paper"),
            "--width, --mean, --schedule paper: decided by the clean model",
        ),
        ((), "BadNets from scratch uses no clean model: use the regime implant to start from it"),
        (("--trigger", "zoo:badnets"), "--trigger is for --preview"),
    ],
)
def test_options_that_would_do_nothing(arguments, expected, files, parts, reprune, tmp_path):
    outcome = reprune(
        *("attack", "badnets", "--data", parts, "--clean-model", files.clean),
        *(*arguments, "--output", tmp_path / "made"),
    )
    assert outcome.status == 2
    assert expected in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("badnets", "--mean", "0.5"), "give both --mean and --std, or neither"),
        (("badnets", "--lr", "0"), "lr must be positive, got 0"),
        (("awp",), "AWP starts from a clean model: use the regime implant"),
        (("trojan", "--set", "layer=nowhere"), "must be a linear layer or an ungrouped"),
    ],
)
def test_what_cannot_work_is_refused_before_a_clean_model_is_trained(
    arguments, expected, parts, reprune, tmp_path, monkeypatch
):
    monkeypatch.setattr("reprune.training.fit", None)
    outcome = reprune("attack", *arguments, "--data", parts, "--output", tmp_path / "made")
    assert outcome.status == 2
    assert expected in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_clean_model_for_other_images(files, parts, reprune, tmp_path):
    options = ("--regime", "implant", "--clean-model", files.clean, "--image-size", 20)
    outcome = reprune("attack", "badnets", "--data", parts, *options, "--output", tmp_path / "made")
    assert outcome.status == 2
    expected = "is for images of shape (3, 16, 16), the training images have (3, 20, 20)"
    assert expected in outcome.err


def test_the_clean_model_is_not_overwritten(parts, reprune, monkeypatch):
    options = ("--regime", "implant", "--clean-model", "zoo:clean")
    zoo = Path(__file__).resolve().parents[2] / "zoo"
    outcome = reprune("attack", "badnets", "--data", parts, *options, "--output", zoo / "clean")
    assert outcome.status == 2
    assert "would replace zoo:clean, which is being read" in outcome.err


def test_a_diverged_run_starts_anew(parts, reprune, tmp_path):
    arguments = ("attack", "badnets", "--data", parts, *SMALL, "--output", tmp_path / "made")
    outcome = reprune(*arguments, "--lr", "1e9")
    assert outcome.status == 2
    assert "lower the learning rate" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_trigger_folder_says_its_target(made, parts, reprune):
    arguments = ("evaluate", made, "--data", parts / "test.npz", "--trigger", made)
    outcome = reprune(*arguments, "--target", 1)
    assert outcome.status == 2
    assert "says what its trigger asks for; leave out --target" in outcome.err


def test_cards_of_wrapped_attacks_say_everything():
    from reprune.attacks import make_attack
    from reprune.crafting import describe_attack

    said = describe_attack(make_attack("adv-t", base="blend", rate="0.2"))
    assert said["rate"] == said["base"]["rate"] == 0.2
    assert said["base"]["attack"] == "Blend"
    assert said["base"]["alpha"] == 0.2
    assert said["target"] == 0


def test_a_trigger_of_another_attack_is_not_drawn(made, parts, reprune, tmp_path):
    outcome = reprune(
        *("attack", "blend", "--preview", "--data", parts),
        *("--trigger", made, "--output", tmp_path / "a.png"),
    )
    assert outcome.status == 2
    assert "holds a trigger of BadNets, not Blend" in outcome.err


def test_an_interrupted_run_says_how_to_go_on(parts, reprune, tmp_path, monkeypatch):
    from reprune import crafting

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crafting, "_round_to_half", interrupted)
    outcome = reprune(
        *("attack", "badnets", "--data", parts, *SMALL, "--half", "--output", tmp_path / "made")
    )
    assert outcome.status == 2
    assert "interrupted; the run is kept in" in outcome.err
    assert "made.checkpoints: give the same command again" in outcome.err


def test_what_is_wrong_comes_before_old_checkpoints(parts, reprune, tmp_path):
    (tmp_path / "made.checkpoints").mkdir()
    (tmp_path / "made.checkpoints/settings.json").write_text("{}")
    arguments = ("attack", "badnets", "--data", parts, *SMALL, "--output", tmp_path / "made")
    wrong = reprune(*arguments, "--set", "size=50")
    assert "a trigger of 50 pixels does not fit" in wrong.err
    wrong = reprune(*arguments[:4], "--arch", "resnet19", *arguments[-2:])
    assert "unknown architecture" in wrong.err
    assert "holds the checkpoints of a run that differs" in reprune(*arguments).err


def test_a_model_at_chance_is_called_so(parts, reprune, tmp_path):
    options = ("--arch", "resnet18", "--width", 8, "--epochs", 1, "--lr", "1e-6")
    outcome = reprune("attack", "badnets", "--data", parts, *options, "--output", tmp_path / "m")
    assert outcome.status == 0
    assert "the model is at chance, so its ASR says nothing" in outcome.out
    assert "BadNets, scratch: resnet18 width=8, 1 epochs of 320 images" in outcome.err


def test_two_widths(parts, reprune, tmp_path):
    options = ("--width", 8, "--arch-args", '{"width": 4}', "--output", tmp_path / "m")
    outcome = reprune("attack", "badnets", "--data", parts, *options)
    assert "--width and the width in --arch-args are the same: give one" in outcome.err
