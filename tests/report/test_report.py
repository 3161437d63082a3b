"""The data behind the page, and what it says about the machine."""

from __future__ import annotations

import getpass
import json
import platform
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from synthetic import make_report

from reprune.report import Report, describe, hardware, summarize, versions
from reprune.results import SiteMask, from_json, to_json


@pytest.mark.parametrize("command", ["purify", "scan"])
def test_a_report_survives_json_exactly(command: Any) -> None:
    report = make_report(command)
    text = json.dumps(to_json(report))
    again = from_json(Report, json.loads(text))
    assert again == report
    assert json.dumps(to_json(again)) == text


def test_parameters_keep_their_types_in_json() -> None:
    report = make_report()
    again = from_json(Report, json.loads(json.dumps(to_json(report))))
    old, new = report.method.parameters, again.method.parameters
    assert {k: type(v) for k, v in new.items()} == {k: type(v) for k, v in old.items()}


def test_layers_and_seconds_come_from_the_trace() -> None:
    report = make_report()
    assert report.layers == summarize(report.trace.masks)
    assert report.seconds == report.trace.seconds


def test_summarize_counts_and_leaves_out_empty_sites() -> None:
    (layer,) = summarize(
        [
            SiteMask("bn", "conv", (0.0, 0.5, 1.0, 0.75), (0.0, 0.5, 1.0, 0.75), (0,)),
            SiteMask("empty", "empty", (), (), ()),
        ]
    )
    assert (layer.channels, layer.pruned, layer.smallest, layer.median) == (4, 1, 0.0, 0.625)


def test_class_names() -> None:
    report = make_report()
    assert report.class_name(3) == "cat (3)"
    assert report.class_name(12) == "class 12"
    assert report.class_name(None) == "undecided"


def test_describe_flattens_nested_settings() -> None:
    @dataclass(frozen=True)
    class Inner:
        lr: float = 0.1
        milestones: tuple[int, ...] = (10, 20)
        clip: float | None = None

    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        device: torch.device
        flip: bool = True

    assert describe(Outer(Inner(), torch.device("cpu"))) == {
        "inner.lr": 0.1,
        "inner.milestones": "10, 20",
        "inner.clip": None,
        "device": "cpu",
        "flip": True,
    }


def test_the_environment_names_no_host_and_no_user() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert "no-such-package" not in versions(("no-such-package",))
    words = hardware("cpu")
    assert "thread" in words
    assert platform.node() not in words
    assert f"/{getpass.getuser()}" not in words
