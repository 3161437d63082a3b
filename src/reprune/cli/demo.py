"""`reprune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reprune.attacks import Goal, read_trigger
from reprune.cli import common
from reprune.data import read_images
from reprune.demo import folder
from reprune.files import check_writable
from reprune.job import write
from reprune.models import load_model
from reprune.rnp import RNP
from reprune.sample import KnownTrigger, Sample
from reprune.workflow import purify


def command(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("reprune-demo"),
    seed: common.Seed = 0,
    device: common.Device = "auto",
    as_json: common.AsJson = False,
) -> None:
    """Purify a small backdoored ResNet that ships with the package, with 500 clean images."""
    place = common.find_device(device)
    check_writable(output)
    here = folder()
    loaded = load_model(here)
    loaded.classifier.to(place)
    clean, test = (read_images(here / f"{name}.parquet").to(place) for name in ("clean", "test"))
    known = KnownTrigger(read_trigger(here / "trigger.npz"), Goal(0), "trigger.npz")
    if not as_json:
        Console(highlight=False, soft_wrap=True).print(
            "A ResNet-18 with a BadNets backdoor (a 3x3 grid in the corner means class 0) and "
            "500 clean CIFAR-10 images. The trigger is used for the before/after figures only."
        )
    with common.progress_bars() as progress:
        job = purify(
            loaded,
            Sample(clean, test, "CIFAR-10, shipped with reprune", seed),
            defense=RNP(),
            method="rnp",
            known=known,
            progress=progress,
        )
    report = write(job, loaded, output)
    common.show(report, output, as_json=as_json)
