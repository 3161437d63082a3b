"""`reprune bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reprune.benchmark import profiles
from reprune.benchmark.catalog import TABLES, table
from reprune.benchmark.cluster import RayWorkers
from reprune.benchmark.export import body, export, head, narrow
from reprune.benchmark.local import LocalWorkers, devices
from reprune.benchmark.measured import compare
from reprune.benchmark.record import COLUMNS
from reprune.benchmark.store import Store
from reprune.benchmark.subjects import Subjects
from reprune.benchmark.sweep import (
    Outcome,
    Place,
    Workers,
    batches,
    missing,
    shard,
    sweep,
)
from reprune.cli import common
from reprune.cli.sweeping import explain, shown, terminable
from reprune.errors import ConfigurationError, InterruptedRunError
from reprune.precision import Precision

app = typer.Typer(
    help="Run the papers' tables, see them beside the printed numbers, and export them.",
    no_args_is_help=True,
)
FAILED = 6
"""Exit status of a sweep in which experiments failed."""

Place_ = Annotated[Path, typer.Option("--store", help="Folder of the records; made if needed.")]
Profile = Annotated[
    Literal["small", "paper"],
    typer.Option(help="small: width 16 and the zoo, for two cores; paper: full size, for GPUs."),
]
Models = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of models with cards, for the tables of every method; repeatable."),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER",
        help="Images of --models whose card names this data set; NAME by default. Repeatable.",
    ),
]
Digits = Annotated[
    Precision | None,
    typer.Option("--precision", help="Another than the profile's: other experiments."),
]
STORE = Path("bench")


@app.callback()
def bench() -> None:
    """Run the papers' tables, see them beside the printed numbers, and export them."""


@app.command("list")
def list_tables(
    store: Place_ = STORE,
    profile: Profile = "small",
    models: Models = None,
    images: Images = None,
    precision: Digits = None,
    as_json: common.AsJson = False,
) -> None:
    """The tables and figures, and how many of their experiments have a record."""
    records, size = Store(store).records(), _size(profile, models, images, precision)
    rows = []
    for name in TABLES:
        one = table(name, size)
        keys = [experiment.key for experiment in one.experiments()]
        ended = [records[k].status for k in keys if k in records]
        rows.append(
            {
                "table": name,
                "title": one.title,
                "experiments": len(keys),
                "done": ended.count("done"),
                "failed": ended.count("failed"),
            }
        )
    if as_json:
        common.print_json(rows)
        return
    caption = f"profile {profile}, {size.precision}, store {store}"
    printed = Table(caption=caption, caption_justify="left")
    for column in rows[0]:
        printed.add_column(column)
    for one_row in rows:
        printed.add_row(*(escape(str(value)) for value in one_row.values()))
    Console(emoji=False).print(printed)


@app.command("run")
def run(
    tables: Annotated[list[str], typer.Argument(metavar="TABLE...", help="Names, or all.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with one folder a data set, each with train and test parts."),
    ] = None,
    models: Models = None,
    images: Images = None,
    store: Place_ = STORE,
    profile: Profile = "small",
    methods: Annotated[
        str | None, typer.Option("--only", help="Only these methods, separated by commas.")
    ] = None,
    precision: Digits = None,
    device: common.Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes; one a GPU, or one, by default.", **common.number(int, 1, 10**4)
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a worker.", **common.number(int, 1, 10**4))
    ] = None,
    part: Annotated[
        str, typer.Option("--shard", help="i/n: the i-th of n parts, from 0, for batch schedulers.")
    ] = "0/1",
    ray_address: Annotated[
        str | None, typer.Option(help="Run on this Ray cluster: auto, or HOST:PORT.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed experiments again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and how long it takes.")
    ] = False,
) -> None:
    """Run what has no record yet; after a crash or Ctrl-C the same command goes on.

    Exit status 6 where experiments failed: their records say why.
    """
    kept = Store(store)
    names = list(TABLES) if tables == ["all"] else tables
    size = _size(profile, models, images, precision)
    experiments = [e for name in names for e in table(name, size).experiments()]
    if methods is not None:
        wanted = {name.strip() for name in methods.split(",")}
        unknown = wanted - {e.method for e in experiments}
        if unknown:
            known = ", ".join(dict.fromkeys(e.method for e in experiments))
            raise ConfigurationError(f"no {', '.join(sorted(unknown))} here; there are {known}")
        experiments = [e for e in experiments if e.method in wanted]
    every = shard(batches(experiments), part)
    records = kept.records()
    todo = missing(every, records, retry=retry)
    if dry_run:
        explain(every, todo, records, kept)
        return
    if not todo:
        Console(emoji=False).print("nothing to do: every experiment has a record")
        return
    kept.check()
    folders = tuple(folder.resolve() for folder in models or ())
    where = Place(
        store.resolve(), data and data.resolve(), folders, _device(device, ray_address), threads
    )
    crew: Workers
    if ray_address is not None:
        crew = RayWorkers(where, ray_address)
    else:
        crew = LocalWorkers(where, devices(device, workers))
    console = Console(stderr=True, emoji=False)
    with shown(todo, records, console) as watch, terminable():
        try:
            outcome = sweep(todo, kept, crew, watch=watch, device=where.device, retry=retry)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                "interrupted; finished experiments are kept: the same command goes on"
            ) from error
    _report(outcome, store)
    if outcome.failed:
        raise typer.Exit(FAILED)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="TABLE")],
    store: Place_ = STORE,
    profile: Profile = "small",
    models: Models = None,
    images: Images = None,
    precision: Digits = None,
    as_json: common.AsJson = False,
) -> None:
    """A table: measured beside printed, by who chose how much to prune."""
    one, records = table(name, _size(profile, models, images, precision)), Store(store).records()
    if as_json:
        columns = head(one)
        common.print_json([dict(zip(columns, line, strict=True)) for line in body(one, records)])
        return
    columns, cells = narrow(one, records)
    same = [i for i, _ in enumerate(one.labels()) if len({line[i] for line in cells}) == 1]
    about = ", ".join(cells[0][i] for i in same)
    title = f"{one.title} ({about})" if about else one.title
    printed = Table(title=escape(title), title_justify="left", box=SIMPLE, padding=0)
    printed.caption = (
        "percent; mean over seeds and draws, the range where it exceeds 2 points; by: who chose "
        "how much to prune; (±): difference from the paper"
    )
    shown = [i for i, _ in enumerate(columns) if i not in same]
    for i in shown:
        printed.add_column(columns[i], overflow="fold")
    before: list[str] = []
    for line in cells:
        where = line[: len(one.labels())]
        printed.add_row(
            *("" if i < len(where) and where == before else escape(line[i]) for i in shown)
        )
        before = where
    Console(emoji=False).print(printed)


@app.command("compare")
def compare_methods(
    first: Annotated[str, typer.Argument(metavar="METHOD")],
    second: Annotated[str, typer.Argument(metavar="OTHER")],
    store: Place_ = STORE,
    selection: Annotated[
        Literal["defender", "fixed", "oracle"], typer.Option(help="Who chose.")
    ] = "defender",
    as_json: common.AsJson = False,
) -> None:
    """Two methods on the same models and draws, pair by pair."""
    rows = compare(Store(store), first, second, selection)
    if as_json:
        common.print_json(rows)
        return
    _print(rows, caption="points; 95 % t-interval of the mean paired difference")


@app.command("query")
def query(
    sql: Annotated[str, typer.Argument(help="SQL over the table records.")],
    store: Place_ = STORE,
    as_json: common.AsJson = False,
) -> None:
    """SQL (DuckDB) over the records: "SELECT count(*) FROM records WHERE selection = 'oracle'"."""
    rows = Store(store).query(sql)
    if as_json:
        common.print_json(rows)
        return
    if not rows:
        Console(emoji=False).print(f"no rows; the columns of records are {', '.join(COLUMNS)}")
        return
    _print(rows)


@app.command("export")
def export_all(
    output: common.Output,
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE...", help="Names of tables and figures; all with records by default."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with one folder a data set: draws pictures of models, too."),
    ] = None,
    store: Place_ = STORE,
    profile: Profile = "small",
    models: Models = None,
    images: Images = None,
    precision: Digits = None,
) -> None:
    """The leaderboard page, all records as Parquet, tables as CSV, LaTeX and Markdown, figures."""
    kept = Store(store)
    subjects = Subjects(data, kept.models, models or ()) if data is not None else None
    export(kept, output, _size(profile, models, images, precision), tables, subjects)
    Console(emoji=False).print(
        f"leaderboard: {escape(str(output / 'leaderboard.html'))}", soft_wrap=True
    )


def _size(
    profile: str,
    models: Sequence[Path] | None,
    images: Sequence[str] | None,
    precision: Precision | None,
) -> profiles.Profile:
    """The profile with the given models, in the given precision."""
    pairs = [text.partition("=") for text in images or ()]
    bad = [name for name, sign, folder in pairs if not (name and sign and folder)]
    if bad:
        raise ConfigurationError(f"--images takes NAME=FOLDER, got {bad[0]!r}")
    size = profiles.find_profile(profile)
    if precision is not None:
        size = replace(size, precision=precision)
    if not models:
        return size
    named = {name: folder for name, _, folder in pairs}
    return replace(size, others=profiles.given_models(models, named))


def _print(rows: Sequence[dict[str, Any]], caption: str | None = None) -> None:
    printed = Table(caption=caption, caption_justify="left")
    for column in rows[0]:
        printed.add_column(escape(column))
    for row in rows:
        printed.add_row(*(_text(value) for value in row.values()))
    Console(emoji=False).print(printed)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else escape(str(value))


def _device(name: str, ray_address: str | None) -> str:
    """The kind of device, checked; "cuda" on a Ray cluster may be on other machines only."""
    elsewhere = ray_address is not None and name.startswith("cuda")
    return name if elsewhere else str(common.find_device(name))


def _report(outcome: Outcome, store: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{outcome.done} experiments done, {outcome.failed} failed")
    if outcome.elsewhere:
        console.print(f"{outcome.elsewhere} are being run by another sweep on {store}")
