"""The command line: parse, call, print."""

from reprune.cli.app import main

__all__ = ["main"]
