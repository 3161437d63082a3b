"""`reprune purify`: what it writes, says and leaves alone."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import planted
from reprune.data import read_images
from reprune.detection import Inverted
from reprune.files import MANIFEST
from reprune.models import load_model
from reprune.report import Report
from reprune.report.words import summary
from reprune.results import Finding, Sign, from_json
from reprune.sample import take_sample
from reprune.workflow import LEFT_OVER, _with_repair

from .conftest import BRIEF_SCAN, Files, Outcome

FILES = [MANIFEST, "card.json", "model.py", "model.safetensors", "report.html", "report.json"]
OUTPUTS = [*FILES, "triggers"]


@dataclass(frozen=True)
class Purified:
    """One run: its folder, what it printed, and its report."""

    output: Path
    outcome: Outcome

    @property
    def report(self) -> Report:
        return from_json(Report, json.loads((self.output / "report.json").read_text()))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def runs(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Purified]:
    """The same purification twice: plainly, and with a known trigger, Parquet and `--json`."""
    root = tmp_path_factory.mktemp("purified")
    settings = ("--samples", 200, "--seed", 3, "--device", "cpu", "--method", "rnp")
    options = {
        "plain": (files.backdoored, "--data", files.npz, *settings),
        "known": (
            *(files.backdoored, "--data", files.parquet, *settings, "--json"),
            *("--trigger", files.trigger, "--target", 2),
        ),
    }
    before = digests(files.backdoored)
    done = {}
    for name, arguments in options.items():
        outcome = _captured("purify", *arguments, "--output", root / "deep" / name)
        done[name] = Purified(root / "deep" / name, outcome)
    assert digests(files.backdoored) == before
    assert sorted(path.name for path in (root / "deep").iterdir()) == sorted(options)
    return done


def _captured(*arguments: object) -> Outcome:
    """As the fixtures `reprune` and `brief_scan`, which are for one test only."""
    import contextlib
    import io
    import sys

    from reprune.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as context, contextlib.redirect_stdout(out):
        context.setattr("reprune.workflow.Scan", BRIEF_SCAN)
        context.setattr(sys, "argv", ["reprune", *map(str, arguments)])
        context.setenv("COLUMNS", "200")
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def test_the_outputs_are_there_and_nothing_else(runs):
    for run in runs.values():
        assert run.outcome.err == ""  # no terminal: no progress bar
        assert sorted(path.name for path in run.output.iterdir()) == sorted(OUTPUTS)


def test_the_exit_status_says_whether_the_repair_sufficed(runs):
    for run in runs.values():
        report = run.report
        assert report.changed
        assert run.outcome.status == (0 if report.trace.repaired else 5)
        for said in (summary(report), *report.finding.reasons[-1:]):
            assert ("The repair did not suffice" in said) != report.trace.repaired
        (moved,) = re.findall(r"and ([\d.]+)% in the repaired one", report.finding.reasons[-1])
        assert (float(moved) <= 100 * LEFT_OVER) == report.trace.repaired
    assert not runs["plain"].report.trace.repaired
    assert "do not use the written model" in runs["plain"].outcome.out


@pytest.mark.parametrize(("search", "suffices"), [("Neural Cleanse", False), ("waves", True)])
def test_only_a_patch_that_accuses_says_that_a_repair_does_not_suffice(search, suffices, files):
    """Patches as large as those of innocent classes work on every model."""
    loaded = load_model(files.backdoored)
    sample = take_sample(read_images(files.npz), loaded, samples=100, seed=0, source="")
    stamp = planted.trigger()
    mask = 1 - stamp.keep[:1]
    inverted = Inverted((2,), mask[None], stamp.add[None], (float(mask.sum()),), (1.0,))
    finding = Finding("backdoored", target=2, signs=(Sign(search, 2, 1.5, ""),))
    model = loaded.classifier
    said, enough = _with_repair(finding, inverted, sample, model, model)
    assert enough == suffices
    assert ("did not suffice" in said.reasons[-1]) != suffices
    assert "in the repaired one" in said.reasons[-1]


def test_the_report_is_strict_json_and_reads_back(runs):
    for run in runs.values():
        text = (run.output / "report.json").read_text()
        data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        report = from_json(Report, data)
        assert report.command == "purify"
        assert report.finding.verdict == "backdoored"
        assert report.finding.target == 2
        assert report.model.class_names == ("vertical", "horizontal", "diagonal", "checks")
        assert report.data.images == 200
        assert report.data.seed == 3


def test_the_report_names_the_weights_that_were_read_and_written(runs, files):
    for run in runs.values():
        model, written = run.report.model, digests(run.output)["model.safetensors"]
        assert model.repaired is not None
        assert model.repaired.sha256 == written
        assert model.original.sha256 == digests(files.backdoored)["model.safetensors"]
        assert model.original.sha256 != written


def test_the_repaired_weights_have_the_same_keys_shapes_and_types(runs, files):
    original = load_file(files.backdoored / "model.safetensors")
    repaired = load_file(runs["plain"].output / "model.safetensors")
    assert repaired.keys() == original.keys()
    for name, tensor in repaired.items():
        assert (tensor.shape, tensor.dtype) == (original[name].shape, original[name].dtype)


def test_only_pruned_channels_differ(runs, files):
    original = load_file(files.backdoored / "model.safetensors")
    repaired = load_file(runs["plain"].output / "model.safetensors")
    pruned = {site.site: site.pruned for site in runs["plain"].report.trace.masks}
    assert sum(map(len, pruned.values())) > 0
    for name, tensor in repaired.items():
        module = name.rpartition(".")[0]
        rows = (
            [] if name.endswith(("running_mean", "running_var")) else list(pruned.get(module, ()))
        )
        if tensor.ndim:
            assert (tensor[rows] == 0).all()
            kept = [row for row in range(len(tensor)) if row not in rows]
            assert torch.equal(tensor[kept], original[name][kept])


def test_the_output_folder_is_itself_a_model(runs, files, reprune):
    output = runs["known"].output
    loaded = load_model(output)
    assert loaded.card.class_names == ("vertical", "horizontal", "diagonal", "checks")
    assert json.loads((output / "card.json").read_text())["repaired_from_sha256"] == (
        runs["known"].report.model.original.sha256
    )
    outcome = reprune("evaluate", output, "--data", files.npz, "--json")
    assert outcome.status == 0
    assert outcome.json()["ca"]["share"] > 0.9


def test_json_and_the_report_file_say_the_same(runs):
    known = runs["known"]
    assert known.outcome.json() == json.loads((known.output / "report.json").read_text())


def test_a_person_gets_verdict_figures_and_the_place_of_the_report(runs):
    text = runs["plain"].outcome.out
    assert "backdoor found, target diagonal (2)" in text
    assert "of 64 channels pruned" in text
    assert "clean accuracy (CA)" in text
    assert "on 100 images that the method did not see" in text
    assert str(runs["plain"].output / "report.html") in text
    assert "ASR" not in text


def test_a_known_trigger_changes_the_report_and_nothing_else(runs):
    """Also: one seed, one outcome, bit by bit, whatever format the images came in."""
    weights = [digests(run.output)["model.safetensors"] for run in runs.values()]
    assert weights[0] == weights[1]
    plain, known = (run.report for run in runs.values())
    assert replace(plain.trace, seconds={}) == replace(known.trace, seconds={})
    assert plain.finding == known.finding
    assert plain.clean == known.clean
    assert plain.attacked is None
    assert known.attacked is not None
    assert known.attacked.before.asr.share > 0.9
    assert known.attacked.before.asr.total == 75
    assert known.attacked.trigger == "trigger.npz"


def test_another_seed_is_another_draw(runs, files, reprune, brief_scan, tmp_path):
    arguments = (files.backdoored, "--data", files.folder, "--samples", 200, "--seed", 4)
    arguments = (*arguments, "--method", "rnp")
    outcome = reprune("purify", *arguments, "--output", tmp_path / "out", "--max-accuracy-drop", 0)
    assert outcome.status == 5  # hardly anything may be pruned
    report = Purified(tmp_path / "out", outcome).report
    assert report.data.seed == 4
    assert report.budget is not None
    assert report.budget.limit == 0
    assert report.trace.phases["unlearn"] != runs["plain"].report.trace.phases["unlearn"]


def test_an_earlier_output_is_replaced_but_not_while_it_is_read(runs, files, reprune, tmp_path):
    model = tmp_path / "repaired"
    model.mkdir()
    for name in FILES:
        (model / name).write_bytes((runs["plain"].output / name).read_bytes())
    before = digests(model)
    for source in (model, model / "model.safetensors"):
        outcome = reprune("purify", source, "--data", files.npz, "--output", model)
        assert outcome.status == 2
        assert "would replace" in outcome.err
        assert "which is being read; choose another folder" in outcome.err
    assert digests(model) == before


def test_the_plain_command_scans_and_repairs(reprune, files, tmp_path):
    arguments = ("--data", files.npz, "--samples", 200, "--output", tmp_path / "out")
    outcome = reprune("purify", files.backdoored, *arguments)
    assert outcome.status == 0
    report = Purified(tmp_path / "out", outcome).report
    assert report.method.name == "auto"
    assert (report.finding.verdict, report.finding.target) == ("backdoored", 2)
    assert set(report.trace.phases) == {"distil at 0.03"}
    assert report.budget.limit == 0.05
    assert report.changed
    assert (tmp_path / "out" / "triggers" / "class-2.npz").is_file()
    assert sum("invert" in phase for phase in report.trace.seconds) == 5


def test_a_clean_model_comes_back_bit_by_bit(reprune, files, tmp_path):
    arguments = ("--data", files.npz, "--samples", 200, "--output", tmp_path / "out")
    outcome = reprune("purify", files.clean, *arguments, "--effort", "low", "--time-limit", 3600)
    assert outcome.status == 0
    said = " ".join(outcome.out.split())
    assert "judged clean: the model is returned as it came" in said
    assert "left out at this effort: 4 of 5 unlearned copies" in said
    before, after = (
        load_file(folder / "model.safetensors") for folder in (files.clean, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_effort_and_time_limit_are_for_the_plain_method(reprune, files, tmp_path):
    arguments = (files.clean, "--data", files.npz, "--output", tmp_path / "out")
    outcome = reprune("purify", *arguments, "--method", "ft", "--effort", "low")
    assert outcome.status == 2
    assert "effort and time limit are for the method auto, not for ft" in outcome.err
    outcome = reprune("purify", *arguments, "--time-limit", "1e-6")
    assert outcome.status == 5
    assert "the time limit of 1e-06 s has passed" in " ".join(outcome.out.split())
