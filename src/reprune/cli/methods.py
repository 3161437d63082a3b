"""`reprune methods`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from reprune.cli import common
from reprune.defenses import DEFENSES, TRAINING_DEFENSES
from reprune.detection import DETECTORS
from reprune.detection.filters import FILTERS

IMAGES, CLASSES = 500, 10
COMMANDS: Mapping[str, Mapping[str, Any]] = {
    "purify": {**DEFENSES, **TRAINING_DEFENSES},
    "scan": DETECTORS,
    "filter": FILTERS,
}
GAINS = ("detection", "trigger", "removal")


def command(as_json: common.AsJson = False) -> None:
    """The methods by command: what each needs, what it gives, and what it costs at most."""
    rows = list(_rows())
    if as_json:
        common.print_json(rows)
        return
    table = Table(
        caption=f"passes: images through the network, forward, at most, in units of the images "
        f"given ({IMAGES} images, {CLASSES} classes). NAME:paper has the settings of the original "
        "paper.",
        caption_justify="left",
    )
    for column in ("command", "method", "what", "source", "needs besides the model"):
        table.add_column(column)
    for column in (*GAINS, "passes"):
        table.add_column(column, justify="right")
    last = ""
    for row in rows:
        marks = ("yes" if row[gain] else "" for gain in GAINS)
        shown = row["command"] if row["command"] != last else ""
        what = (row["title"], row["source"], ", ".join(row["needs"]) or "nothing")
        table.add_row(shown, row["method"], *what, *marks, f"{row['passes']:.0f}")
        last = row["command"]
    Console(highlight=False).print(table)


def _rows() -> Iterator[dict[str, Any]]:
    for job, registry in COMMANDS.items():
        for name, make in registry.items():
            if ":" in name:
                continue
            method = make()
            yield {
                "command": job,
                "method": name,
                "presets": [other for other in registry if other.startswith(f"{name}:")],
                "title": method.title,
                "source": method.source_paper,
                "needs": list(method.needs),
                **{gain: gain in method.gives for gain in GAINS},
                "passes": round(method.passes(IMAGES, CLASSES), 1),
            }
