"""What the command line says about itself."""

from __future__ import annotations

import pytest

from reprune.cli.common import progress_bars

COMMON = ("--data", "--arch", "--num-classes", "--mean", "--std", "--device", "--json")
OPTIONS = {
    "purify": (
        *COMMON,
        "--output",
        "--method",
        "--effort",
        "--time-limit",
        "--max-accuracy-drop",
        "--samples",
        "--seed",
    ),
    "scan": (*COMMON, "--output", "--samples", "--seed", "--image-size", "--arch-args"),
    "evaluate": (*COMMON, "--trigger", "--target"),
    "demo": ("--output", "--seed", "--device", "--json"),
}


def test_help_lists_the_commands(reprune):
    outcome = reprune("--help")
    assert outcome.status == 0
    assert all(command in outcome.out for command in OPTIONS)
    assert "Find and remove backdoors" in outcome.out


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_mentions_its_options(command, reprune):
    outcome = reprune(command, "--help")
    assert outcome.status == 0
    assert [option for option in OPTIONS[command] if option not in outcome.out] == []


def test_help_says_what_matters(reprune):
    assert "0 clean, 3 backdoor found, 4 undecided" in reprune("scan", "--help").out
    assert "for evaluation only" in reprune("purify", "--help").out
    assert "appears whole or not at all" in reprune("purify", "--help").out


def test_a_scan_takes_no_trigger(reprune):
    assert "--trigger" not in reprune("scan", "--help").out


def test_the_version(reprune):
    outcome = reprune("--version")
    assert (outcome.status, outcome.out[:10]) == (0, "reprune 0.")


def test_a_phase_that_ends_early_shows_no_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with progress_bars() as progress:
        progress("prune", 6, 8, channels=1018, drop=0.00444)
        progress("invert", 1, 150)
    said = capsys.readouterr().err
    assert "6/6" in said
    assert "left 0:00:00 channels 1.02e+03  drop 0.00444" in said
    assert "1/150" in said


def test_without_a_terminal_progress_is_silent(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_bars() as progress:
        progress("unlearn", 22, 160)
    assert capsys.readouterr().err == ""
