"""`reprune attack`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reprune.attacks import ATTACKS, Attack, Goal, make_attack
from reprune.cli import common
from reprune.crafting import checkpoints_for, craft, read_backdoor, write_crafted
from reprune.data import ImageSet, draw, read_parts
from reprune.errors import ConfigurationError, DivergenceError, InterruptedRunError
from reprune.files import atomic_file, check_writable
from reprune.models import LoadedModel, load_model, locate, read_card
from reprune.planning import Plan, check_plan, describe_attack, summary
from reprune.precision import Precision
from reprune.report import Comparison, preview
from reprune.training import Training
from reprune.types import Progress

PREVIEWED = 500
"""Images that a preview poisons to get at the trigger."""

NUMBER = common.number(float, 0, 1e9, words="a number")


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="An attack; see --list.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled images; a folder with train and test parts, or one part."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; with --preview, a .png file.")
    ] = None,
    list_attacks: Annotated[bool, typer.Option("--list", help="List the attacks.")] = False,
    show_preview: Annotated[
        bool, typer.Option("--preview", help="Only draw the trigger on sample images.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(help="As for purify: built-in, timm:NAME, ...; resnet18 by default."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Width of the architecture; 64 by default for resnet18.",
            **common.number(int, 1, 4096),
        ),
    ] = None,
    arch_args: common.ArchArgs = None,
    regime: Annotated[
        Literal["scratch", "implant"],
        typer.Option(help="Start from random weights, or from a clean model."),
    ] = "scratch",
    clean_model: Annotated[
        str | None,
        typer.Option(help="Clean MODEL to start from or to attack; trained first if needed."),
    ] = None,
    target: Annotated[
        int | None, typer.Option(help="Target class; 0 by default.", **common.number(int, 0, 2**31))
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Poisoning rate; 0.1, or 0.08 where labels are kept, by default.", **NUMBER
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other parameter; see --list."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the data; 30 by default, implanting 5.",
            **common.number(int, 1, 10**6),
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Largest learning rate; 0.2 by default, implanting 0.05.", **NUMBER),
    ] = None,
    schedule: Annotated[
        Literal["one-cycle", "paper"],
        typer.Option(help="From scratch; paper: 200 epochs at 0.1, a tenth after 60 and 120."),
    ] = "one-cycle",
    padding: Annotated[
        int,
        typer.Option(help="Zeros around images before random crops.", **common.number(int, 0, 512)),
    ] = 4,
    mirror: Annotated[bool, typer.Option(help="Mirror images at random in training.")] = True,
    test: Annotated[
        Path | None, typer.Option(help="Test images, if DATA has none; else a tenth is held out.")
    ] = None,
    image_size: common.ImageSize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile (CUDA).")] = False,
    precision: Annotated[
        Precision,
        typer.Option(help="bfloat16 is fast on CPUs with AMX; auto uses it on CUDA only."),
    ] = "auto",
    half: Annotated[bool, typer.Option("--half", help="Store the weights as float16.")] = False,
    trigger: Annotated[
        str | None,
        typer.Option(help="For --preview: folder or zoo:NAME with a trigger that was learned."),
    ] = None,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    as_json: common.AsJson = False,
) -> None:
    """Make a backdoored model, for evaluations: train it, measure it, keep its trigger.

    A run that was killed goes on where it was when the same command is given again.
    """
    if list_attacks:
        _list(as_json)
        return
    if name is None:
        raise ConfigurationError(f"name an attack: one of {', '.join(ATTACKS)}")
    attack = _attack(name, target, rate, parameters or [])
    missing = [o for o, value in (("--data", data), ("--output", output)) if value is None]
    if data is None or output is None:
        raise ConfigurationError(f"{' and '.join(missing)}: needed to make a model")
    if trigger is not None and not show_preview:
        raise ConfigurationError("--trigger is for --preview")
    place = common.find_device(device)
    if show_preview:
        check_writable(output, folder=False)
    else:
        common.check_output(output, data, test, clean_model)
    clean = None
    if clean_model is not None:
        clean = load_model(clean_model)
        clean.classifier.to(place)
    if regime == "implant" and clean_model is not None:
        options = {"--arch": arch, "--width": width, "--arch-args": arch_args, "--mean": mean}
        options |= {"--std": std, "--schedule paper": schedule == "paper" or None}
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise ConfigurationError(
                f"{', '.join(given)}: decided by the clean model that the attack is implanted "
                "into; leave it out"
            )
    base = Training.paper() if schedule == "paper" else Training()
    shared: dict[str, Any] = {
        "padding": padding,
        "mirror": mirror,
        "compile": compiled,
        "precision": precision,
    }
    clean_training = training = replace(base, **shared)
    if regime == "implant":
        training = replace(Training.implant(), **shared)
    changes: dict[str, Any] = {"epochs": epochs, "lr": lr}
    training = replace(training, **{key: v for key, v in changes.items() if v is not None})
    plan = Plan(
        name=name,
        attack=attack,
        regime=regime,
        training=training,
        clean_training=clean_training,
        arch=arch or "resnet18",
        arch_args=_arch_arguments(arch_args, width),
        mean=common.numbers("--mean", mean),
        std=common.numbers("--std", std),
        seed=seed,
        half=half,
    )
    with common.progress_bars() as progress:
        train, held_out = (
            part.to(place)
            for part in read_parts(
                data,
                test,
                size=None if image_size is None else (image_size, image_size),
                class_names=clean.card.class_names if clean else None,
                progress=progress,
            )
        )
        if show_preview:
            _preview(attack, train, clean, trigger, output, seed, progress)
            return
        check_plan(plan, train, held_out, clean)
        checkpoints = checkpoints_for(plan, train, output, clean)
        if not as_json:
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                escape(summary(plan, train, held_out, clean))
            )
        try:
            crafted = craft(
                plan,
                train,
                held_out,
                clean=clean,
                source=data.resolve().name,
                clean_source=_named(clean_model),
                checkpoints=checkpoints,
                progress=progress,
            )
        except DivergenceError:  # from here it would only diverge again
            checkpoints.clear()
            raise
        except KeyboardInterrupt as error:
            if not checkpoints.folder.exists():
                raise
            raise InterruptedRunError(
                f"interrupted; the run is kept in {checkpoints.folder}: give the same command "
                "again to go on"
            ) from error
        write_crafted(crafted, output)
        checkpoints.clear()
    if as_json:
        common.print_json(crafted.evaluation)
        return
    console = Console(highlight=False, soft_wrap=True)
    comparison = Comparison(f"{len(held_out):,} test images", crafted.evaluation)
    console.print(common.comparison_table(comparison))
    for note in crafted.notes:
        console.print(f"[bold yellow]note:[/] {escape(note)}")
    console.print(f"model: {escape(str(output))}")


def _attack(name: str, target: int | None, rate: float | None, texts: list[str]) -> Attack:
    parameters: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigurationError(f"--set takes KEY=VALUE, got {text!r}")
        key = key.strip().replace("-", "_")
        if key in parameters:
            raise ConfigurationError(f"--set {key} is given twice")
        parameters[key] = value.strip()
    given = {"target": target, "rate": rate}
    for key, number in given.items():
        if number is not None and key in parameters:
            raise ConfigurationError(f"--{key} and --set {key} are the same: give one")
        if number is not None:
            parameters[key] = number
    return make_attack(name, **parameters)


def _arch_arguments(text: str | None, width: int | None) -> dict[str, Any]:
    given = common.arch_arguments(text)
    if width is None:
        return given
    if "width" in given:
        raise ConfigurationError("--width and the width in --arch-args are the same: give one")
    return given | {"width": width}


def _named(model: str | None) -> str:
    """How a card names a model: never a path of this machine."""
    if model is None or model.startswith("zoo:"):
        return model or ""
    return Path(model).resolve().name


def _preview(
    attack: Attack,
    data: ImageSet,
    clean: LoadedModel | None,
    trigger: str | None,
    output: Path,
    seed: int,
    progress: Progress,
) -> None:
    if trigger is not None:
        known = read_backdoor(trigger)
        made_by = read_card(locate(trigger) / "card.json").extra.get("attack", {}).get("title")
        if made_by != attack.title:
            raise ConfigurationError(f"{trigger} holds a trigger of {made_by}, not {attack.title}")
        shown, goal = known.trigger, known.goal
    else:
        classes = data.num_classes
        attack.check(data, classes)
        shown = attack.preview_trigger(
            draw(data, PREVIEWED, torch.Generator().manual_seed(seed)),
            torch.Generator().manual_seed(seed),
            num_classes=classes,
            surrogate=clean.classifier if clean else None,
            progress=progress,
        )
        goal = attack.goal or Goal(None)
    with atomic_file(output) as path:
        path.write_bytes(preview(data, shown, goal, f"{attack.title}: {goal}"))
    Console(highlight=False, soft_wrap=True).print(f"preview: {escape(str(output))}")


def _list(as_json: bool) -> None:
    rows: dict[str, dict[str, Any]] = {
        name: {
            "title": attack.title,
            "paper": attack.source_paper,
            "clean_label": attack.clean_label,
            "needs_clean_model": attack.needs_surrogate,
            "parameters": describe_attack(attack()),
        }
        for name, attack in ATTACKS.items()
    }
    if as_json:
        common.print_json(rows)
        return
    table = Table(show_lines=False)
    for column in ("name", "attack", "paper", "labels", "clean model", "parameters (--set)"):
        table.add_column(column, overflow="fold")
    for name, row in rows.items():
        settings = " ".join(
            f"{key}={value['attack'] if isinstance(value, dict) else _short(value)}"
            for key, value in row["parameters"].items()
        )
        labels = "kept" if row["clean_label"] else "changed"
        table.add_row(
            name,
            row["title"],
            row["paper"],
            "" if name == "clean" else labels,
            "needed" if row["needs_clean_model"] else "",
            settings,
        )
    Console(highlight=False).print(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()
