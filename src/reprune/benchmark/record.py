"""What is left of an experiment, and the flat row that tables, queries and pages read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from reprune.benchmark.spec import Experiment
from reprune.metrics import defense_effectiveness


@dataclass(frozen=True, kw_only=True)
class Record:
    """One experiment and what came of it.

    Attributes:
        key: of the experiment.
        experiment: the spec.
        status: "failed" where the method, the model or the worker failed; `error` says how.
        before, after: `ca`, `asr` and `ra` of the model as it came and repaired, in percent.
        figures: what else was measured: channels `pruned` of `channels`, `floor`,
            `reactivated`, `queried` (ASR in percent), `verdict`, `found`, `target`, `top`,
            `strength`, `signs` by search.
        notes: what the method said.
        seconds: of the method alone, by the processor's clock on a CPU and the wall's on others.
        made: version, hardware, torch, threads, `settings` (`settings_digest`), `model`
            (`model_digest`), `at` (UTC).
    """

    key: str
    experiment: Experiment
    status: Literal["done", "failed"]
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None
    seconds: float | None = None
    made: dict[str, Any] = field(default_factory=dict)


COLUMNS: dict[str, str] = {
    "key": "VARCHAR",
    "outcome": "VARCHAR",
    "status": "VARCHAR",
    "task": "VARCHAR",
    "data": "VARCHAR",
    "arch": "VARCHAR",
    "width": "DOUBLE",
    "attack": "VARCHAR",
    "parameters": "VARCHAR",
    "regime": "VARCHAR",
    "source": "VARCHAR",
    "model": "VARCHAR",
    "model_key": "VARCHAR",
    "model_seed": "BIGINT",
    "method": "VARCHAR",
    "settings": "VARCHAR",
    "selection": "VARCHAR",
    "images": "BIGINT",
    "draw": "BIGINT",
    "part": "VARCHAR",
    "seed": "BIGINT",
    "test_images": "BIGINT",
    "precision": "VARCHAR",
    "ca_before": "DOUBLE",
    "asr_before": "DOUBLE",
    "ra_before": "DOUBLE",
    "ca": "DOUBLE",
    "asr": "DOUBLE",
    "ra": "DOUBLE",
    "ca_drop": "DOUBLE",
    "der": "DOUBLE",
    "floor": "DOUBLE",
    "excess": "DOUBLE",
    "reactivated": "DOUBLE",
    "queried": "DOUBLE",
    "pruned": "BIGINT",
    "channels": "BIGINT",
    "verdict": "VARCHAR",
    "found": "BIGINT",
    "top": "BIGINT",
    "target": "BIGINT",
    "strength": "DOUBLE",
    "auroc": "DOUBLE",
    "seconds": "DOUBLE",
    "error": "VARCHAR",
    "version": "VARCHAR",
    "hardware": "VARCHAR",
    "at": "VARCHAR",
}
"""The columns of a row and their types in DuckDB. Rates are in percent.

Records with the same `outcome` are of one repair; they differ in what else was measured.
"""


def row(record: Record, floor: float | None = None) -> dict[str, Any]:
    """A record as one flat row of `COLUMNS`.

    Args:
        record: the record.
        floor: ASR of a clean model on the same triggered images, in percent; by default the
            record's own.
    """
    spec, figures = record.experiment, record.figures
    before, after = record.before, record.after
    floor = figures.get("floor", floor)
    drop = before["ca"] - after["ca"] if "ca" in before and "ca" in after else None
    gain = before["asr"] - after["asr"] if "asr" in before and "asr" in after else None
    values = {
        "key": record.key,
        "outcome": spec.outcome.key,
        "status": record.status,
        "task": spec.task,
        "data": spec.model.data,
        "arch": spec.model.arch,
        "width": spec.model.width,
        "attack": spec.model.attack,
        "parameters": _settings(spec.model.parameters),
        "regime": spec.model.regime,
        "source": spec.model.source,
        "model": spec.model.label,
        "model_key": spec.model.key,
        "model_seed": spec.model.seed,
        "method": spec.method,
        "settings": _settings(spec.settings),
        "selection": spec.selection,
        "images": spec.images,
        "draw": spec.draw,
        "part": spec.part,
        "seed": spec.seed,
        "test_images": spec.test_images,
        "precision": spec.precision,
        **{f"{name}_before": before.get(name) for name in ("ca", "asr", "ra")},
        **{name: after.get(name) for name in ("ca", "asr", "ra")},
        "ca_drop": drop,
        "der": None if drop is None or gain is None else 100 * defense_effectiveness(gain, drop),
        "floor": floor,
        "excess": after["asr"] - floor if floor is not None and "asr" in after else None,
        **{
            name: figures.get(name)
            for name in ("reactivated", "queried", "pruned", "channels", "verdict", "found")
        },
        **{name: figures.get(name) for name in ("top", "target", "strength", "auroc")},
        "seconds": record.seconds,
        "error": record.error,
        **{name: record.made.get(name) for name in ("version", "hardware", "at")},
    }
    return {name: values[name] for name in COLUMNS}


def rows(records: list[Record]) -> list[dict[str, Any]]:
    """All records as rows; the floor of a model is that of any record which measured it."""
    floors = {r.experiment.model.key: r.figures["floor"] for r in records if "floor" in r.figures}
    return [row(r, floors.get(r.experiment.model.key)) for r in records]


def _settings(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())
