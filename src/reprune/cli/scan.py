"""`reprune scan`."""

from __future__ import annotations

from typing import Annotated

import typer

from reprune.cli import common
from reprune.detection import make_detector
from reprune.job import write
from reprune.sample import take_sample
from reprune.workflow import scan_model


def command(
    model: common.Model,
    data: common.Data,
    output: common.Output,
    arch: common.Arch = None,
    detector: Annotated[
        str, typer.Option(help="scan, nc, nu+nc or nu; with :paper (not scan) published settings.")
    ] = "scan",
    samples: common.Samples = 500,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    precision: common.MethodPrecision = "auto",
    num_classes: common.Classes = None,
    mean: common.Mean = None,
    std: common.Std = None,
    arch_args: common.ArchArgs = None,
    image_size: common.ImageSize = None,
    as_json: common.AsJson = False,
) -> None:
    """Say whether MODEL is backdoored: exit status 0 clean, 3 backdoor found, 4 undecided."""
    method = make_detector(detector)
    place = common.find_device(device)
    common.check_output(output, model, data)
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
        images = common.read(data, loaded, image_size, progress)
        sample = take_sample(
            images, loaded, samples=samples, seed=seed, source=str(data), device=place
        )
        job = scan_model(
            loaded,
            sample,
            detector=method,
            name=detector,
            precision=precision,
            progress=progress,
        )
    report = write(job, loaded, output)
    common.show(report, output, as_json=as_json)
    raise typer.Exit(common.EXIT[report.finding.verdict])
