"""`reprune methods`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
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
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption="D, T, R: helps to detect backdoors, recover triggers, remove backdoors. passes: "
        f"images through the network at most, over the images given (here {IMAGES}, of {CLASSES} "
        "classes); fewer where a goal is reached early. NAME:paper is with the settings of the "
        "original paper. nu+: with the model unlearned first, as in RNP.",
        caption_justify="left",
    )
    for column in ("", "method", "what", "needs"):
        table.add_column(column)
    for column in ("D", "T", "R", "passes"):
        table.add_column(column, justify="right")
    for job in COMMANDS:
        for at, row in enumerate(row for row in rows if row["command"] == job):
            marks = ("x" if row[gain] else "" for gain in GAINS)
            table.add_row(
                job if at == 0 else "",
                row["method"],
                row["title"],
                ", ".join(row["needs"]) or "nothing",
                *marks,
                f"{row['passes']:.0f}",
            )
        table.add_section()
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
