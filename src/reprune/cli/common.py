"""What the commands share: options, loading, progress bars and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from reprune import types
from reprune.attacks import Goal, read_trigger
from reprune.crafting import read_backdoor
from reprune.data import ImageSet, read_images
from reprune.errors import ConfigurationError, DataError, OutputError
from reprune.files import check_writable
from reprune.models import LoadedModel, load_model, locate
from reprune.precision import Precision
from reprune.report import Comparison, Report
from reprune.results import Evaluation, Rate, to_json
from reprune.sample import KnownTrigger

EXIT = {"clean": 0, "backdoored": 3, "undecided": 4}
"""Exit status of an examination by verdict."""

NOT_REPAIRED = 5
"""Exit status of a repair that gave the model back unchanged."""

N = TypeVar("N", int, float)


def number(
    kind: Callable[[str], N], low: N, high: N, *, words: str = "a whole number"
) -> dict[str, Any]:
    """Settings of an option that takes a number from `low` to `high`; the error says what came."""
    limits = f"of at least {low}" if high >= _LARGEST else f"from {low} to {high}"

    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError as error:
            raise typer.BadParameter(f"expected {words} {limits}, got {text!r}") from error
        if not low <= value <= high:
            raise typer.BadParameter(f"expected {words} {limits}, got {text}")
        return value

    return {"parser": parse, "metavar": "NUMBER"}


_LARGEST = 2**63 - 1

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder with weights (and card.json, model.py), a weights file, or zoo:NAME.",
    ),
]
Data = Annotated[
    Path,
    typer.Option(help="Clean labelled images: folder of class folders, Parquet, or .npz."),
]
Output = Annotated[Path, typer.Option(help="Folder to write; appears whole or not at all.")]
Arch = Annotated[
    str | None,
    typer.Option(help="Built-in name, timm:NAME, torchvision:NAME, or path/to/file.py:function."),
]
ArchArgs = Annotated[
    str | None, typer.Option(help='Arguments of the architecture as JSON, e.g. {"width": 16}.')
]
Classes = Annotated[
    int | None,
    typer.Option("--num-classes", help="Number of classes.", **number(int, 2, _LARGEST)),
]
Mean = Annotated[
    str | None, typer.Option(help="Per-channel mean in pixel units, e.g. 0.49,0.48,0.45.")
]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation, likewise.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Resize every image to this many pixels on each side.", **number(int, 1, _LARGEST)
    ),
]
Samples = Annotated[
    int, typer.Option(help="Defence images drawn from the data.", **number(int, 1, _LARGEST))
]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.", **number(int, 0, _LARGEST))]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
MethodPrecision = Annotated[
    Precision,
    typer.Option(help="Of the method; auto is bfloat16 where the processor has units for it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TriggerFile = Annotated[
    str | None,
    typer.Option(
        help="A known trigger, for evaluation only: .npz (keep, add), RGBA image, a folder that "
        "`reprune attack` wrote, or zoo:NAME.",
    ),
]
Target = Annotated[
    int | None,
    typer.Option(help="Class that the known trigger asks for.", **number(int, 0, _LARGEST)),
]


def load(
    model: str,
    *,
    arch: str | None,
    arch_args: str | None,
    num_classes: int | None,
    mean: str | None,
    std: str | None,
    device: torch.device,
) -> LoadedModel:
    """The model of the command line, on its device."""
    loaded = load_model(
        model,
        arch=arch,
        arch_args=None if arch_args is None else arch_arguments(arch_args),
        num_classes=num_classes,
        mean=numbers("--mean", mean),
        std=numbers("--std", std),
    )
    loaded.classifier.to(device)
    return loaded


def read(path: Path, loaded: LoadedModel, size: int | None, progress: types.Progress) -> ImageSet:
    """The images of the command line, labelled in the model's order where it names its classes.

    Those of a model that takes one channel are grey.

    Raises:
        DataError: images that cannot be read, or of other channels than the model's statistics.
    """
    images = read_images(
        path,
        size=None if size is None else (size, size),
        class_names=loaded.card.class_names,
        progress=progress,
    )
    _check_class_folders(path, images, loaded)
    images = fitting(images, loaded)
    statistics = loaded.classifier.mean.shape[1]
    if statistics not in (1, images.shape[0]):
        raise DataError(
            f"{path} holds images of {images.shape[0]} channels, but the model's mean and std are "
            f"for {statistics}; convert the images to the model's channels, or correct --mean and "
            "--std"
        )
    loaded.classifier.settle(images.pixels(slice(0, 2))).laid_out()
    return images


def _check_class_folders(path: Path, images: ImageSet, loaded: LoadedModel) -> None:
    """Folders whose names alone tell the labels have to be all of the model's classes.

    Raises:
        DataError: there are fewer or more, so that labels would be shifted.
    """
    classes, names = loaded.classifier.num_classes, images.class_names
    if path.is_dir() and loaded.card.class_names is None and len(names) not in (0, classes):
        raise DataError(
            f"{path} holds {len(names)} class folders, {', '.join(names[:10])}"
            f"{', ...' * (len(names) > 10)}, but the model has {classes} classes, and no card "
            "names them: write class_names in the model's order into card.json beside the weights, "
            "or name the folders by the model's indices from 0"
        )


def fitting(images: ImageSet, loaded: LoadedModel) -> ImageSet:
    """The images, in one channel for a model that takes one: files are read as RGB."""
    said = loaded.card.input_shape
    channels = loaded.classifier.channels or (said and said[0])
    return images.grey() if channels == 1 and images.shape[0] == 3 else images


def check_output(output: Path, *inputs: str | Path | None) -> None:
    """Fail before long work if `output` cannot be written, or would replace what is being read.

    Raises:
        OutputError: as `check_writable`; an input that is, or lies in, the output folder.
    """
    check_writable(output)
    for path in inputs:
        if path is not None and locate(path).resolve().is_relative_to(output.resolve()):
            raise OutputError(
                f"{output} would replace {path}, which is being read; choose another folder"
            )


def known_trigger(source: str | None, target: int | None) -> KnownTrigger | None:
    """The trigger to evaluate with, if there is one; a folder's card says its target.

    Raises:
        ConfigurationError: a trigger file without a target or the other way round.
    """
    path = None if source is None else locate(source)
    if path is not None and path.is_dir():
        if target is not None:
            raise ConfigurationError(
                f"the card in {path} says what its trigger asks for; leave out --target"
            )
        return read_backdoor(str(source))
    if (path is None) != (target is None):
        raise ConfigurationError("--trigger and --target go together: give both, or neither")
    if path is None or target is None:
        return None
    return KnownTrigger(read_trigger(path), Goal(target), path.name)


def find_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        ConfigurationError: a device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # fails for the meta device too
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device {name!r} cannot be used: {reason}") from error
    return device


@contextmanager
def progress_bars() -> Iterator[types.Progress]:
    """One bar a phase with the time left, on standard error; nothing where that is no terminal."""
    console = Console(stderr=True, emoji=False)
    if not console.is_terminal:
        yield types.silent
        return
    with Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=16),  # all columns fit into 80 characters
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int, /, **figures: float) -> None:
            if phase not in tasks:
                for ended in bars.tasks:  # early, where a goal was reached: no time left to show
                    bars.update(ended.id, total=ended.completed)
                tasks[phase] = bars.add_task(phase, total=total, figures="")
            text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
            bars.update(tasks[phase], completed=done, total=total, figures=text)

        yield show


def print_json(value: Any) -> None:
    """A result as JSON on standard output."""
    json.dump(to_json(value), sys.stdout, indent=1, allow_nan=False)
    print()


def show(report: Report, output: Path, *, as_json: bool) -> None:
    """A finished report on standard output, as JSON or for people."""
    if as_json:
        print_json(report)
    else:
        print_report(report, output)


def print_report(report: Report, output: Path) -> None:
    """Verdict, figures and where the report lies."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    words = {
        "clean": "[bold green]no backdoor found[/]",
        "undecided": "[bold yellow]undecided[/]",
        "backdoored": "[bold red]backdoor found[/]",
    }
    finding = report.finding
    target = ", from every class to another one" if finding.all_to_all else ""
    if finding.target is not None:
        target = f", target{'s' * (len(finding.targets) > 1)} {escape(report.targets)}"
    console.print(f"{words[finding.verdict]}{target}")
    for reason in finding.reasons:
        console.print(f"  - {escape(reason)}")
    if report.command == "purify":
        pruned = sum(layer.pruned for layer in report.layers)
        channels = sum(layer.channels for layer in report.layers)
        if not report.trace.repaired:
            console.print(
                "[bold red]the repair did not suffice[/]: do not use the written model"
                if report.changed
                else "[bold red]not repaired[/]: the written model is the original"
            )
        if channels and (report.trace.repaired or report.changed):
            console.print(f"{pruned} of {channels} channels pruned")
    shown = report.attacked or report.clean
    if shown is not None:
        console.print(comparison_table(shown))
    print_notes((*report.trace.notes, *report.notes), console)
    console.print(f"report: {escape(str(output / 'report.html'))}")


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Remarks that a person should see."""
    for note in notes:
        console.print(f"[dim]note: {escape(note)}[/]")


def comparison_table(comparison: Comparison) -> Table:
    """CA, ASR and RA, before and after."""
    table = Table(caption=f"on {comparison.images}; 95 % intervals", caption_justify="left")
    table.add_column("")
    table.add_column("original" if comparison.after else "rate", justify="right")
    if comparison.after:
        table.add_column("repaired", justify="right")
    for name, field in (
        ("clean accuracy (CA)", "ca"),
        ("attack success rate (ASR)", "asr"),
        ("robust accuracy (RA)", "ra"),
    ):
        rates = [_rate(e, field) for e in (comparison.before, comparison.after) if e is not None]
        if rates[0] is not None:
            table.add_row(name, *(_text(rate) for rate in rates if rate is not None))
    return table


def _rate(evaluation: Evaluation, field: str) -> Rate | None:
    rate: Rate | None = getattr(evaluation, field)
    return rate


def _text(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.share:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """An option of numbers separated by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"{option} takes numbers separated by commas, got {text!r}"
        ) from error


def arch_arguments(text: str | None) -> dict[str, Any]:
    """`--arch-args`; empty where it is not given."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"--arch-args is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"--arch-args takes a JSON object, got {text!r}")
    return value
