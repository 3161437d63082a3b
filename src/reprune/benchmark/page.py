"""`leaderboard`: records as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from reprune.benchmark.columns import RUNS, SUMMARIES
from reprune.benchmark.record import Record
from reprune.benchmark.spec import NONE
from reprune.benchmark.summary import Table, entries, number, summarize
from reprune.report.html import environment
from reprune.results import to_json

FILTERS = {
    "task": "Task",
    "selection": "Selection",
    "attack": "Attack",
    "architecture": "Architecture",
    "data": "Data set",
    "method": "Method",
}
"""What the page can be filtered by: field of an entry, and its label."""

SELECTIONS = {
    "defender": "the method itself chose how much to remove, from clean images only",
    "fixed": "a number given beforehand",
    "oracle": "the best number by the success rate of the test attack itself, which no defender "
    "has: an upper bound, never averaged with other runs and only shown when asked for",
}


def leaderboard(records: Iterable[Record], title: str = "Backdoor removal benchmark") -> str:
    """One HTML page with everything in the records, which loads nothing from elsewhere.

    The summary of the runs whose selection is `defender` is readable without JavaScript; filters,
    sorting, the plot and single records need it. The address keeps the state:
    `#selection=all&attack=badnets&sort=-asr` is all selections on BadNets, the largest mean ASR
    first; `#record=KEY` shows one record. Equal records make an equal page.

    Args:
        records: of experiments of any task; of two with the same key the last one counts.
        title: the page's heading.
    """
    kept = list({record.key: record for record in records}.values())
    found = entries(kept)
    tasks = [task for task in SUMMARIES if any(one["task"] == task for one in found)]
    tasks = tasks or ["removal"]
    defaults = dict.fromkeys(FILTERS, "all") | {"task": tasks[0], "selection": "defender"}
    template = _environment().get_template("leaderboard.html.j2")
    page = template.render(
        title=title,
        tasks=tasks,
        summaries=SUMMARIES,
        runs=RUNS,
        lines={task: summarize(_default(found, task), SUMMARIES[task]) for task in tasks},
        filters={name: _options(name, found, tasks) for name in FILTERS},
        labels=FILTERS,
        defaults=defaults,
        selections=SELECTIONS,
        facts=_facts(found),
        made=_made(kept),
        data=_embedded(
            {
                "defaults": defaults,
                "tables": {task: _columns(SUMMARIES[task], RUNS[task]) for task in tasks},
                "names": list(found[0]) if found else [],
                "rows": [list(one.values()) for one in found],
                "records": {record.key: record for record in kept},
            }
        ),
    )
    return page.encode("utf-8", "replace").decode()


def _environment() -> Environment:
    """The report's, with the templates of this folder."""
    loader = ChoiceLoader(
        [PackageLoader(f"reprune.{part}", ".") for part in ("benchmark", "report")]
    )
    made = environment().overlay(loader=loader)
    made.filters = made.filters | {"number": number}
    return made


def _default(found: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """What the page shows at first."""
    return [
        one
        for one in found
        if one["task"] == task and (one["selection"] == "defender" or one["method"] == NONE)
    ]


def _options(name: str, found: Sequence[dict[str, Any]], tasks: list[str]) -> list[str]:
    if name == "task":
        return tasks
    if name == "selection":
        return [*SELECTIONS, "all"]
    return ["all", *sorted({one[name] for one in found})]


def _facts(found: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts for the head of the page."""
    distinct = {"models": "model_key", "attacks": "attack", "methods": "method"}
    return {
        "runs": len(found),
        **{name: len({one[field] for one in found}) for name, field in distinct.items()},
        "failed": sum(one["status"] == "failed" for one in found),
    }


def _made(kept: Sequence[Record]) -> dict[str, list[str]]:
    """Under which circumstances the records were made: each value that occurs."""
    names = [name for record in kept for name in record.made if name != "at"]
    found = {
        name: sorted({str(r.made[name]) for r in kept if r.made.get(name) is not None})
        for name in dict.fromkeys(names)
    }
    days = sorted(str(record.made["at"])[:10] for record in kept if record.made.get("at"))
    if days:
        found["at"] = [days[0]] if days[0] == days[-1] else [f"{days[0]} to {days[-1]}"]
    return {name: values for name, values in found.items() if values}


def _columns(summary: Table, runs: Table) -> dict[str, Any]:
    return {
        name: {"sort": table.sort, "columns": [asdict(column) for column in table.columns]}
        for name, table in (("sort", summary), ("runs", runs))
    }


def _embedded(data: Any) -> Markup:
    """JSON that cannot end the script element it is in, or open a comment."""
    return Markup(json.dumps(to_json(data), allow_nan=False).replace("<", "\\u003c"))


__all__ = ["leaderboard"]
