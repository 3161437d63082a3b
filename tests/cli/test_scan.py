"""`reprune scan`: verdicts and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from reprune.files import MANIFEST
from reprune.report import Report
from reprune.results import Finding, from_json
from reprune.workflow import Job, scan_model

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
    report = from_json(Report, json.loads(done.stdout))
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
    ]


def test_a_clean_model_is_not_called_backdoored(files, reprune, tmp_path):
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

    monkeypatch.setattr("reprune.workflow._examine", lambda *_, **__: (Finding("clean"), None))
    monkeypatch.setattr("reprune.cli.scan.scan_model", judged)
    outcome = reprune("scan", files.clean, "--data", files.npz, "--output", tmp_path / "out")
    assert outcome.status == status
    assert outcome.out.startswith(words)
    assert all(f"  - {reason}\n" in outcome.out for reason in finding.reasons)
    assert (tmp_path / "out" / "report.html").is_file()
