"""`reprune evaluate`: figures on a table or as JSON."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

import planted
from reprune.data import ImageSet
from reprune.results import Evaluation, from_json

from .conftest import write_npz, write_pictures


def test_clean_accuracy(files, reprune):
    outcome = reprune("evaluate", files.backdoored, "--data", files.npz)
    assert outcome.status == 0
    assert "clean accuracy (CA)" in outcome.out
    assert "on 300 images; 95 % intervals" in outcome.out
    assert "attack success rate" not in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize("source", ["npz", "parquet", "folder"])
def test_a_known_trigger_in_every_format_of_images(source, files, reprune):
    outcome = reprune(
        *("evaluate", files.backdoored, "--data", getattr(files, source), "--json"),
        *("--trigger", files.trigger, "--target", 2),
    )
    assert outcome.status == 0
    result = from_json(Evaluation, outcome.json())
    assert result.ca.total == 300
    assert result.ca.share > 0.95
    assert result.target == 2
    assert result.asr.total == 225
    assert result.asr.share > 0.95
    assert result.ra.share < 0.05


def test_what_was_guessed_of_the_model_is_said(files, reprune, tmp_path):
    folder = planted.write_model(tmp_path / "model", num_classes=None)
    for options in ((), ("--json",)):
        outcome = reprune("evaluate", folder, "--data", files.npz, *options)
        assert outcome.status == 0
        said = outcome.err if options else outcome.out
        assert "note: number of classes read off the last layer: 4" in said


def test_without_a_class_folder_labels_would_be_shifted(files, reprune, tmp_path):
    data = planted.stripes(120, seed=55)
    pictures = write_pictures(tmp_path / "images", data.subset((data.labels > 0).nonzero()[:, 0]))
    model = planted.write_model(tmp_path / "model", class_names=None)
    outcome = reprune("evaluate", model, "--data", pictures)
    assert outcome.status == 2
    assert "holds 3 class folders, checks, diagonal, horizontal, but the model has 4" in outcome.err
    named = planted.write_model(tmp_path / "named")
    assert reprune("evaluate", named, "--data", pictures).status == 0


def test_a_few_images_of_a_few_classes_will_do(files, reprune, tmp_path):
    data = planted.stripes(40, seed=1)
    data = data.subset((data.labels < 2).nonzero().flatten())
    outcome = reprune(
        *("evaluate", files.backdoored, "--data", write_npz(tmp_path / "few.npz", data), "--json")
    )
    assert outcome.status == 0
    assert [rate["total"] for rate in outcome.json()["per_class"]] == [10, 10, 0, 0]


def test_without_images_of_other_classes_there_is_no_attack_success_rate(files, reprune, tmp_path):
    data = planted.stripes(80, seed=1)
    data = data.subset((data.labels == 2).nonzero().flatten())
    path = write_npz(tmp_path / "target.npz", ImageSet(data.images, data.labels))
    outcome = reprune(
        *("evaluate", files.backdoored, "--data", path),
        *("--trigger", files.trigger, "--target", 2),
    )
    assert outcome.status == 2
    assert "on these 20 images: all are of the target class 2; add images of" in outcome.err


def test_pictures_are_grey_for_a_model_of_one_channel(files, reprune, tmp_path):
    data = planted.stripes(120, seed=55)
    data = ImageSet(data.images[:, :1].repeat(1, 3, 1, 1), data.labels, data.class_names)
    folder = write_pictures(tmp_path / "grey", data)
    model = planted.write_model(
        tmp_path / "model", preprocessing={"mean": [0.5], "std": [0.25]}, input_shape=(1, 16, 16)
    )
    source = model / "model.py"
    source.write_text(source.read_text().replace("Conv2d(3, 16", "Conv2d(1, 16"))
    weights = load_file(model / "model.safetensors")
    weights["0.weight"] = weights["0.weight"].sum(1, keepdim=True)
    save_file(weights, model / "model.safetensors")
    one, three = (
        reprune("evaluate", place, "--data", folder, "--json").json()["ca"]
        for place in (model, files.backdoored)
    )
    assert one == three
    assert one["total"] == 120
    examined = ("filter", model, "--images", folder, "--data", folder, "--output", tmp_path / "out")
    assert reprune(*examined).status in (0, 4)
