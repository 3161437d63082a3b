"""`reprune filter`: what is found, what is written, exit statuses, errors."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from scipy.stats import betabinom

import planted
from corner import coloured, joined, with_corner, write_by_hand
from reprune.attacks import poison
from reprune.data import ImageSet
from reprune.data.suspects import read_suspects
from reprune.detection.clustering import ActivationClustering
from reprune.detection.filtering import Filtered
from reprune.detection.filters import FILTERS
from reprune.detection.spectral import SpectralSignatures
from reprune.detection.strip import STRIP
from reprune.errors import DataError
from reprune.files import MANIFEST
from reprune.report.filter_report import FilterReport
from reprune.results import from_json
from reprune.rnp import Unlearning
from reprune.sifting import chance_of, judge

from .conftest import write_npz


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setitem(FILTERS, "strip", lambda: STRIP(overlays=10))
    monkeypatch.setitem(FILTERS, "nu+strip", lambda: STRIP(overlays=4, unlearning=Unlearning()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_by_hand(tmp_path_factory.mktemp("model") / "corner")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """300 clean images."""
    data = coloured(300, seed=9)
    return write_npz(tmp_path_factory.mktemp("clean") / "clean.npz", data)


@pytest.fixture(scope="module")
def suspects() -> ImageSet:
    """40 images, the last 20 with the trigger, a white corner."""
    data = joined(coloured(20, seed=8), with_corner(coloured(20, seed=7)))
    return ImageSet(data.images.mul(255).round().byte(), data.labels)


@pytest.fixture
def flat(suspects, tmp_path):
    """The same images in a folder of pictures."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for row, image in enumerate(suspects.images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{row:02}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A poisoned training set."""
    data = poison(
        planted.stripes(1600, seed=10), planted.ATTACK, torch.Generator().manual_seed(0)
    ).data
    return write_npz(tmp_path_factory.mktemp("training") / "train.npz", data)


def table(output) -> list[dict[str, str]]:
    with (output / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- what is found -------------------------------------------------------------------------


def test_triggers_in_a_flat_folder_are_found(model, clean, flat, reprune, tmp_path):
    output = tmp_path / "out"
    outcome = reprune(
        *("filter", model, "--images", flat, "--data", clean, "--output", output),
        *("--device", "cpu"),
    )
    assert outcome.status == 3
    assert outcome.err == ""
    assert outcome.out.startswith("triggers found\n")
    assert sorted(path.name for path in output.iterdir()) == [
        MANIFEST,
        "images.csv",
        "report.html",
        "report.json",
    ]
    rows = table(output)
    assert [row["file"] for row in rows] == [f"{k:02}.png" for k in range(40)]
    assert [row["row"] for row in rows] == [str(k) for k in range(40)]
    assert {row["label"] for row in rows} == {""}
    flagged = [int(row["flagged"]) for row in rows]
    assert sum(flagged[20:]) >= 18
    assert sum(flagged[:20]) <= 2
    report = from_json(FilterReport, json.loads((output / "report.json").read_text()))
    assert (report.verdict, report.images, report.flagged) == ("backdoored", 40, sum(flagged))
    assert report.threshold is not None
    for row in rows:
        assert (float(row["score"]) > report.threshold) == (row["flagged"] == "1")
    assert report.histogram is not None
    assert sum(report.histogram.examined) == 40
    assert sum(report.histogram.clean) == 300
    page = (output / "report.html").read_text()
    assert page.count("<img") == 24
    assert "Triggers found" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_clean_images_are_let_through(files, reprune, tmp_path):
    output = tmp_path / "out"
    outcome = reprune(
        *("filter", files.clean, "--images", files.folder, "--data", files.parquet),
        *("--output", output, "--false-rejection", "0.05", "--device", "cpu", "--json"),
    )
    assert outcome.err == ""
    assert outcome.status == 0
    report = from_json(FilterReport, outcome.json())
    assert report == from_json(FilterReport, json.loads((output / "report.json").read_text()))
    assert report.verdict == "clean"
    assert report.method.parameters["false_rejection"] == 0.05
    rows = table(output)
    assert rows[0]["file"].startswith("vertical/")
    assert {row["label"] for row in rows} == set("0123")


@pytest.mark.parametrize(("detector", "status"), [("clustering", 3), ("spectral", 4)])
def test_a_training_set_needs_no_clean_images(detector, status, files, training, reprune, tmp_path):
    output = tmp_path / "out"
    outcome = reprune(
        *("filter", files.backdoored, "--images", training, "--output", output),
        *("--detector", detector),
    )
    assert outcome.status == status
    assert outcome.err == ""
    assert len(table(output)) == 1600
    report = from_json(FilterReport, json.loads((output / "report.json").read_text()))
    assert report.clean is None
    assert report.threshold is None
    assert {row["label"] for row in table(output)} == set("0123")


def test_the_same_run_twice_scores_the_same(files, reprune, tmp_path):
    for name in ("a", "b"):
        reprune(
            *("filter", files.backdoored, "--images", files.folder, "--data", files.npz),
            *("--detector", "nu+strip", "--samples", "200", "--output", tmp_path / name),
        )
    report = from_json(FilterReport, json.loads((tmp_path / "a" / "report.json").read_text()))
    assert sum(report.histogram.clean) == 100  # the others were unlearned
    assert report.trace.label is not None
    assert table(tmp_path / "a") == table(tmp_path / "b")


# --- the verdict ---------------------------------------------------------------------------


@pytest.mark.parametrize("examined", [1, 30, 2000])
@pytest.mark.parametrize(("clean", "k"), [(99, 1), (500, 5), (60, 6)])
def test_the_chance_is_the_tail_of_a_beta_binomial(examined, clean, k):
    law = betabinom(examined, k, clean + 1 - k)
    for flagged in {0, 1, examined // 10, examined}:
        expected = 1.0 if flagged == 0 else law.sf(flagged - 1)
        found = chance_of(flagged, examined, clean, k - 1)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)  # scipy's tail


def filtered(flagged: int, total: int = 100, lost: int = 0, clean: int = 500) -> Filtered:
    scores = torch.zeros(total)
    scores[:flagged] = 1.0
    scores[total - lost :] = float("nan")
    kept = torch.zeros(clean)
    kept[: clean // 100 - 1] = 1.0  # as a threshold at a false-rejection rate of 1 % leaves them
    return Filtered(scores, ~(scores <= 0.5), 0.5, ("as seen",), kept)


@pytest.mark.parametrize(
    ("flagged", "lost", "verdict"),
    [
        (0, 0, "clean"),
        (2, 0, "clean"),
        (6, 0, "undecided"),
        (12, 0, "backdoored"),
        (0, 1, "undecided"),
        (12, 1, "backdoored"),
    ],
)
def test_verdicts_on_a_threshold(flagged, lost, verdict):
    found, reasons = judge(filtered(flagged, lost=lost), STRIP())
    assert found == verdict
    assert reasons[0] == "as seen"
    assert f"about 1.0 would be flagged; {flagged} or more with a chance of" in reasons[1]


def test_verdicts_without_a_threshold():
    some = replace(filtered(9), threshold=None, clean_scores=torch.empty(0))
    none = replace(filtered(0), threshold=None, clean_scores=torch.empty(0))
    assert judge(some, ActivationClustering())[0] == "backdoored"
    assert judge(none, ActivationClustering())[0] == "clean"
    found, reasons = judge(some, SpectralSignatures())
    assert found == "undecided"
    assert "flags a fixed share of any data" in reasons[-1]


# --- images --------------------------------------------------------------------------------


def test_what_folders_are_read_as(files, flat, tmp_path):
    known = read_suspects(files.folder, labelled=False, class_names=planted.NAMES)
    assert known.labelled
    assert len(known.files) == len(known.data) == 300
    assert known.files[0].startswith("vertical/")
    for file, label in zip(known.files, known.data.labels.tolist(), strict=True):
        assert file.split("/")[0] == planted.NAMES[label]
    loose = read_suspects(flat, labelled=False)
    assert (loose.labelled, len(loose.files)) == (False, 40)
    (flat / "more").mkdir()
    Image.new("RGB", (6, 6)).save(flat / "more" / "a.png")
    mixed = read_suspects(flat, labelled=False, class_names=planted.NAMES)
    assert (mixed.labelled, len(mixed.files), mixed.files[-1]) == (False, 41, "more/a.png")
    strange = tmp_path / "strange"
    (strange / "unknown").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(strange / "unknown" / "a.png")
    assert not read_suspects(strange, labelled=False, class_names=planted.NAMES).labelled
    with pytest.raises(DataError, match="that the model does not know: unknown"):
        read_suspects(strange, labelled=True, class_names=planted.NAMES)
    with pytest.raises(DataError, match="holds no class folders"):
        read_suspects(tmp_path / "flat" / "more", labelled=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no pictures; found only \.txt"):
        read_suspects(empty, labelled=False)
    with pytest.raises(DataError, match="no such file or folder"):
        read_suspects(tmp_path / "absent", labelled=False)


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the detector strip needs clean labelled images: give --data"),
        (("--detector", "strp"), "unknown detector 'strp'; known detectors: strip"),
        (("--detector", "spectral", "--false-rejection", "0.1"), "leave out the false-rejection"),
        (("--false-rejection", "1"), "false_rejection must lie in (0, 1), got 1.0"),
    ],
)
def test_options_that_do_not_go_together(options, message, files, flat, reprune, tmp_path):
    output = tmp_path / "outputs" / "out"
    outcome = reprune(
        "filter", tmp_path / "no model yet", "--images", flat, "--output", output, *options
    )
    assert outcome.status == 2
    assert message in outcome.err
    assert not output.parent.exists()


def test_clean_images_that_would_not_be_used(files, training, reprune, tmp_path):
    outcome = reprune(
        *("filter", files.backdoored, "--images", training, "--data", files.npz),
        *("--output", tmp_path / "out", "--detector", "clustering"),
    )
    assert outcome.status == 2
    assert "uses no clean images: leave out --data" in outcome.err


def test_images_that_do_not_fit_the_model(files, reprune, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    for k in range(2):
        Image.new("RGB", (20, 20)).save(folder / f"{k}.png")
    arguments = ("filter", files.clean, "--images", folder, "--data", files.npz, "--output")
    outcome = reprune(*arguments, tmp_path / "out")
    assert outcome.status == 2
    assert "(3, 16, 16), got (3, 20, 20); pass --image-size" in outcome.err
    grey = planted.stripes(60, seed=1)
    npz = write_npz(tmp_path / "grey.npz", ImageSet(grey.images[:, :1], grey.labels))
    outcome = reprune(
        "filter", files.clean, "--images", npz, "--data", files.npz, "--output", tmp_path / "out"
    )
    assert outcome.status == 2
    assert "the examined images have 1 channels" in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_the_images(model, clean, flat, reprune):
    outcome = reprune("filter", model, "--images", flat, "--data", clean, "--output", flat)
    assert outcome.status == 2
    assert len(list(flat.iterdir())) == 41


def test_too_few_clean_images_for_the_rate(model, clean, flat, reprune, tmp_path):
    outcome = reprune(
        *("filter", model, "--images", flat, "--data", clean, "--samples", "60"),
        *("--output", tmp_path / "out"),
    )
    assert outcome.status == 2
    assert "needs at least 99 clean images to set the threshold, got 60" in outcome.err


def test_help_mentions_the_options(reprune):
    outcome = reprune("filter", "--help")
    assert outcome.status == 0
    for option in ("--images", "--data", "--output", "--detector", "--false-rejection", "--json"):
        assert option in outcome.out
    assert "0 none found, 3 triggers found, 4 undecided" in " ".join(outcome.out.split())
