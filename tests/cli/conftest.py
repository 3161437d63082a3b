"""What the command line is given: folders and files with the planted model and its images."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import planted
from reprune.attacks import write_trigger
from reprune.cli import main
from reprune.data import ImageSet
from reprune.detection import Scan


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which must be JSON and nothing else."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Reprune = Callable[..., Outcome]
BRIEF_SCAN = partial(Scan, joint=None)
"""Of triggers seeks patches only."""


@pytest.fixture
def reprune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Reprune:
    """`reprune("scan", model, ...)` as the shell would run it, in this process."""

    def run(*arguments: object, columns: int = 200) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["reprune", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def brief_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What methods that do not scan on their own are given."""
    monkeypatch.setattr("reprune.workflow.Scan", BRIEF_SCAN)


@dataclass(frozen=True)
class Files:
    """Inputs, read only: two models, 300 clean images in three formats, the trigger."""

    backdoored: Path
    clean: Path
    npz: Path
    parquet: Path
    folder: Path
    trigger: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("inputs")
    data = planted.stripes(300, seed=55)
    write_npz(root / "clean.npz", data)
    pictures = data.images.permute(0, 2, 3, 1).numpy()
    rows: list[dict[str, Any]] = []
    for picture, label in zip(pictures, data.labels.tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
    pq.write_table(pa.Table.from_pylist(rows), root / "clean.parquet")
    write_trigger(planted.trigger(), root / "trigger.npz")
    return Files(
        planted.write_model(root / "backdoored"),
        planted.write_model(root / "innocent", backdoored=False),
        root / "clean.npz",
        root / "clean.parquet",
        write_pictures(root / "clean", data),
        root / "trigger.npz",
    )


def write_npz(path: Path, data: ImageSet) -> Path:
    """Images as a user would save them: channels last."""
    np.savez(path, images=data.images.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy())
    return path


def write_pictures(folder: Path, data: ImageSet) -> Path:
    """Images of three channels as .png files, a folder for each class."""
    pictures = data.images.permute(0, 2, 3, 1).numpy()
    for number, (picture, label) in enumerate(zip(pictures, data.labels.tolist(), strict=True)):
        place = folder / data.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:03}.png")
    return folder
