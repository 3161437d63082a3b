"""`reprune zoo`."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from reprune.cli import common
from reprune.models import read_card, zoo_models

app = typer.Typer(
    help="Small backdoored models that come with the repository, by attack.",
    no_args_is_help=True,
)


@app.callback()
def zoo() -> None:
    """Small backdoored models that come with the repository, by attack."""


@app.command("list")
def list_models(as_json: common.AsJson = False) -> None:
    """The models of the zoo; any command takes `zoo:NAME` as MODEL."""
    rows: list[dict[str, Any]] = []
    for name, folder in zoo_models().items():
        card = read_card(folder / "card.json")
        rows.append(
            {"model": f"zoo:{name}", "arch": card.arch, "arch_args": card.arch_args}
            | {key: card.extra.get(key) for key in ("regime", "CA", "ASR", "RA")}
        )
    if as_json:
        common.print_json(rows)
        return
    table = Table(caption="percent, on the test images of the card", caption_justify="left")
    for column in ("model", "architecture", "regime"):
        table.add_column(column)
    for column in ("CA", "ASR", "RA"):
        table.add_column(column, justify="right")
    for row in rows:
        arch = " ".join([str(row["arch"]), *(f"{k}={v}" for k, v in row["arch_args"].items())])
        figures = ("" if row[key] is None else f"{row[key]:.1f}" for key in ("CA", "ASR", "RA"))
        table.add_row(row["model"], arch, row["regime"], *figures)
    Console(highlight=False).print(table)
