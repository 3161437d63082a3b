"""`reprune filter`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from reprune.cli import common
from reprune.data.suspects import read_suspects
from reprune.detection.filtering import Filter
from reprune.detection.filters import FILTERS, make_filter
from reprune.errors import ConfigurationError
from reprune.report.filter_page import BANNERS, summary
from reprune.report.filter_report import FilterReport
from reprune.sample import take_sample
from reprune.sifting import sift, write_sifted

COLOURS = {"clean": "bold green", "backdoored": "bold red", "undecided": "bold yellow"}


def command(
    model: common.Model,
    images: Annotated[
        Path,
        typer.Option(
            help="Images to examine: folder of class folders, Parquet, .npz; where labels are not "
            "needed also a folder of pictures."
        ),
    ],
    output: common.Output,
    data: Annotated[
        Path | None,
        typer.Option(help="Clean labelled images, for the detectors that need them (strip)."),
    ] = None,
    detector: Annotated[str, typer.Option(help=f"{', '.join(FILTERS)}.")] = "strip",
    false_rejection: Annotated[
        float | None,
        typer.Option(
            help="Share of clean images that may be flagged; 0.01 by default.",
            **common.number(float, 0, 1, words="a number"),
        ),
    ] = None,
    arch: common.Arch = None,
    samples: common.Samples = 500,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    num_classes: common.Classes = None,
    mean: common.Mean = None,
    std: common.Std = None,
    arch_args: common.ArchArgs = None,
    image_size: common.ImageSize = None,
    as_json: common.AsJson = False,
) -> None:
    """Say which IMAGES carry a trigger: exit status 0 none found, 3 triggers found, 4 undecided."""
    chosen = make_filter(detector, false_rejection=false_rejection)
    labelled = _check_data(chosen, detector, data)
    place = common.find_device(device)
    common.check_output(output, model, images, data)
    loaded = common.load(
        model,
        arch=arch,
        arch_args=arch_args,
        num_classes=num_classes,
        mean=mean,
        std=std,
        device=place,
    )
    with common.progress_bars() as progress:
        sample = None
        if data is not None:
            sample = take_sample(
                common.read(data, loaded, image_size, progress),
                loaded,
                samples=samples,
                seed=seed,
                source=str(data),
                device=place,
            )
        suspects = read_suspects(
            images,
            labelled=labelled,
            size=None if image_size is None else (image_size, image_size),
            class_names=loaded.card.class_names,
            progress=progress,
        )
        suspects = replace(suspects, data=common.fitting(suspects.data, loaded))
        sifted = sift(
            loaded,
            suspects,
            sample,
            detector=chosen,
            method=detector,
            source=str(images),
            seed=seed,
            progress=progress,
        )
    write_sifted(sifted, output)
    if as_json:
        common.print_json(sifted.report)
    else:
        _print(sifted.report, output)
    raise typer.Exit(common.EXIT[sifted.report.verdict])


def _check_data(chosen: Filter, name: str, data: Path | None) -> bool:
    """Whether the method takes the labels of the examined images instead of clean ones.

    Raises:
        ConfigurationError: clean images that are missing, or that would not be used.
    """
    labelled = "training data" in chosen.needs
    if labelled and data is not None:
        raise ConfigurationError(
            f"the detector {name} examines a training set and uses no clean images: leave out "
            "--data"
        )
    if not labelled and data is None:
        raise ConfigurationError(
            f"the detector {name} needs clean labelled images: give --data, or examine a labelled "
            "training set with --detector spectral or clustering"
        )
    return labelled


def _print(report: FilterReport, output: Path) -> None:
    """Verdict, figures and where the files lie."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[{COLOURS[report.verdict]}]{BANNERS[report.verdict].lower()}[/]")
    for reason in (summary(report), *report.reasons):
        console.print(f"  - {escape(reason)}")
    for note in (*report.trace.notes, *report.notes):
        console.print(f"[dim]note: {escape(note)}[/]")
    console.print(f"images: {escape(str(output / 'images.csv'))}")
    console.print(f"report: {escape(str(output / 'report.html'))}")
