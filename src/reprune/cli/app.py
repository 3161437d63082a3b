"""`reprune`: the commands, and what an error looks like."""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from reprune.cli import attack, bench, demo, evaluate, methods, purify, scan, zoo
from reprune.cli import filter as sift
from reprune.errors import RepruneError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""How torch says it on its devices."""


class _Interrupted(Exception):
    """Ctrl-C, under a name that Typer does not turn into an exit status of its own."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    name="reprune",
    cls=_Commands,
    help="Find and remove backdoors in PyTorch image classifiers with a few hundred clean images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("purify")(purify.command)
app.command("scan")(scan.command)
app.command("filter")(sift.command)
app.command("evaluate")(evaluate.command)
app.command("attack")(attack.command)
app.add_typer(zoo.app, name="zoo")
app.add_typer(bench.app, name="bench")
app.command("methods")(methods.command)
app.command("demo")(demo.command)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"reprune {version('reprune')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """The options of `reprune` itself."""


def main() -> None:
    """Run the command line; every foreseen error ends with one message and exit status 2."""
    try:
        app(prog_name="reprune")
    except RepruneError as error:
        _fail(str(error))
    except (_Interrupted, KeyboardInterrupt):
        _fail("interrupted; nothing was written")
    except MemoryError:
        _fail("out of memory; use fewer --samples or another --device")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(f"the disk is full: {error}; nothing was written" if full else str(error))
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        _fail(f"out of memory; use fewer --samples or another --device ({error})")


def _fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/] {escape(message)}"
    )
    sys.exit(2)
