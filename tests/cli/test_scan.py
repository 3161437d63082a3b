"""`reprune scan`: verdicts and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from reprune.attacks.trigger_files import read_trigger
from reprune.detection import Scan, Scanned, UnlearnedLabel
from reprune.files import MANIFEST
from reprune.job import Job
from reprune.report import Report
from reprune.results import Finding, from_json
from reprune.workflow import scan_model

ARGUMENTS = ("--samples", "200", "--device", "cpu")


def test_the_planted_backdoor_is_found_by_the_real_command(files, tmp_path):
    output = tmp_path / "scan"
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from reprune.cli import main; main()"),
            *("scan", files.backdoored, "--data", files.folder, "--output", output),
            *(*ARGUMENTS, "--json"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["finding"]["targets"] == [2]
    report = from_json(Report, said)
    assert report == from_json(Report, json.loads((output / "report.json").read_text()))
    assert (report.command, report.finding.verdict, report.finding.target) == (
        "scan",
        "backdoored",
        2,
    )
    assert report.clean is not None
    assert report.clean.after is None
    assert report.model.repaired is None
    assert sorted(path.name for path in output.iterdir()) == [
        MANIFEST,
        "report.html",
        "report.json",
        "triggers",
    ]
    assert report.method.name == "scan"
    trigger = output / "triggers" / "class-2.npz"
    assert read_trigger(trigger).keep.shape == (3, 16, 16)
    assert trigger.with_suffix(".png").is_file()


def test_a_recovered_trigger_serves_elsewhere(files, reprune, tmp_path):
    scanned = tmp_path / "scan"
    arguments = ("--data", files.npz, *ARGUMENTS)
    reprune("scan", files.backdoored, *arguments, "--detector", "nc", "--output", scanned)
    report = json.loads((scanned / "report.json").read_text())
    assert report["method"]["name"] == "nc"
    assert report["trace"]["label"] is None
    outcome = reprune(
        *("evaluate", files.backdoored, "--data", files.npz),
        *("--trigger", scanned / "triggers" / "class-2.npz", "--target", "2", "--device", "cpu"),
    )
    assert outcome.status == 0


def test_a_detector_without_triggers(files, reprune, tmp_path):
    outcome = reprune(
        *("scan", files.backdoored, "--data", files.npz, "--output", tmp_path / "out"),
        *(*ARGUMENTS, "--detector", "nu:paper"),
    )
    assert outcome.status == 3
    assert not (tmp_path / "out" / "triggers").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"]["name"] == "nu:paper"
    assert report["finding"]["scores"][2]["size"] is None


def test_an_unknown_detector(files, reprune, tmp_path):
    outcome = reprune(
        *("scan", files.clean, "--data", files.npz, "--output", tmp_path / "out"),
        *("--detector", "nuu"),
    )
    assert outcome.status != 0
    assert "unknown detector 'nuu'; known detectors: scan, nc" in " ".join(outcome.err.split())


def test_a_clean_model_is_not_called_backdoored(files, reprune, tmp_path, monkeypatch):
    monkeypatch.setattr("reprune.cli.scan.make_detector", lambda _: Scan(unlearning=None))
    outcome = reprune("scan", files.clean, "--data", files.npz, "--output", tmp_path / "out")
    assert outcome.status in (0, 4)
    assert ("no backdoor found" in outcome.out) == (outcome.status == 0)
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("finding", "status", "words"),
    [
        (Finding("clean", ("nothing [stands] out",)), 0, "no backdoor found\n"),
        (Finding("backdoored", (), 1), 3, "backdoor found, target horizontal (1)\n"),
        (Finding("undecided", ("torn",)), 4, "undecided\n  - torn\n"),
    ],
)
def test_exit_statuses(finding, status, words, files, reprune, tmp_path, monkeypatch):
    def judged(*args: object, **kwargs: object) -> Job:
        job = scan_model(*args, **kwargs)
        return replace(job, report=replace(job.report, finding=finding), recovered=None)

    monkeypatch.setattr("reprune.workflow._examine", lambda *_, **__: Scanned(Finding("clean")))
    monkeypatch.setattr("reprune.cli.scan.scan_model", judged)
    outcome = reprune("scan", files.clean, "--data", files.npz, "--output", tmp_path / "out")
    assert outcome.status == status
    assert outcome.out.startswith(words)
    assert all(f"  - {reason}\n" in outcome.out for reason in finding.reasons)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_detector_runs_in_the_chosen_precision(
    precision, files, reprune, tmp_path, monkeypatch
):
    seen = []

    def examine(self, model, clean, *, generator, progress):
        seen.append(torch.is_autocast_enabled("cpu"))
        return Scanned(Finding("clean"))

    monkeypatch.setattr(UnlearnedLabel, "examine", examine)
    command = ("scan", files.clean, "--data", files.npz, "--output", tmp_path / "out", *ARGUMENTS)
    assert reprune(*command, "--detector", "nu", "--precision", precision).status == 0
    assert seen == [precision == "bfloat16"]
