"""`reprune purify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from reprune.cli import common
from reprune.defenses import make_defense
from reprune.job import write
from reprune.sample import take_sample
from reprune.workflow import check_training, purify


def command(
    model: common.Model,
    data: common.Data,
    output: common.Output,
    arch: common.Arch = None,
    method: Annotated[
        str, typer.Option(help="See `reprune methods`; NAME:paper is with published settings.")
    ] = "auto",
    effort: Annotated[
        Literal["low", "normal", "high"] | None,
        typer.Option(help="How long auto searches; normal by default."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which auto ends with the best model so far.",
            **common.number(float, 0, 10**9, words="a number"),
        ),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            help="Accuracy that the repair may cost, 0.02 = 2 points; the method's own by default.",
            **common.number(float, 0, 1, words="a number"),
        ),
    ] = None,
    training_data: Annotated[
        Path | None,
        typer.Option(help="The model's own training data, for methods that train it anew (abl)."),
    ] = None,
    samples: common.Samples = 500,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    precision: common.MethodPrecision = "auto",
    trigger: common.TriggerFile = None,
    target: common.Target = None,
    num_classes: common.Classes = None,
    mean: common.Mean = None,
    std: common.Std = None,
    arch_args: common.ArchArgs = None,
    image_size: common.ImageSize = None,
    as_json: common.AsJson = False,
) -> None:
    """Repair MODEL with clean images and write model, report.json and report.html."""
    defense = make_defense(
        method, max_accuracy_drop=max_accuracy_drop, effort=effort, time_limit=time_limit
    )
    check_training(defense, training_data)
    known = common.known_trigger(trigger, target)
    place = common.find_device(device)
    common.check_output(output, model, data, training_data)
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
        training = None
        if training_data is not None:
            training = common.read(training_data, loaded, image_size, progress).to(place)
        job = purify(
            loaded,
            sample,
            defense=defense,
            method=method,
            training=training,
            known=known,
            precision=precision,
            progress=progress,
        )
    report = write(job, loaded, output)
    common.show(report, output, as_json=as_json)
    if not report.trace.repaired:
        raise typer.Exit(common.NOT_REPAIRED)
