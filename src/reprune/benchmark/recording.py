"""What records say beside the figures: how an experiment ended, where, and how long it took."""

from __future__ import annotations

import math
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reprune.benchmark.record import Record
from reprune.benchmark.settings import model_digest, settings_digest
from reprune.benchmark.spec import Experiment
from reprune.benchmark.subjects import Subject
from reprune.errors import RepruneError
from reprune.report import hardware, versions
from reprune.results import Finding


def failed(experiment: Experiment, error: BaseException, device: torch.device | str) -> Record:
    """The record of an experiment that ended with an error."""
    expected = isinstance(error, RepruneError)
    where = () if expected else (_where(error),)
    return Record(
        key=experiment.key,
        experiment=experiment,
        status="failed",
        error=f"{type(error).__name__}: {error}",
        notes=where,
        made=made(device, experiment),
    )


def _where(error: BaseException) -> str:
    """The lines that an unexpected error came through, without folders."""
    frames = traceback.extract_tb(error.__traceback__)
    return "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)


def made(device: torch.device | str, experiment: Experiment) -> dict[str, Any]:
    """The circumstances of a record; no name of a machine, a user or a folder."""
    known = versions(("reprune", "torch"))
    return {
        "version": known.get("reprune"),
        "torch": known["torch"],
        "python": known["python"],
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "settings": settings_digest(experiment),
        "model": model_digest(experiment.model),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def verdict(finding: Finding, subject: Subject) -> dict[str, Any]:
    """What a scan said; `top` is the class that it would name, `None` for all-to-all."""
    ranked = [score for score in finding.scores if math.isfinite(score.index)]
    highest = max(ranked, key=lambda score: score.index).label if ranked else None
    return {
        "verdict": finding.verdict,
        "found": finding.target,
        "strength": finding.strength,
        "signs": {
            s.search: {"class": s.label, "strength": round(s.strength, 3)}
            for s in sorted(finding.signs, key=lambda sign: sign.strength)  # the strongest stays
        },
        "top": highest if finding.strength is None else finding.suspect,
        "target": subject.known.goal.target if subject.known else None,
    }


class Clock:
    """Seconds since it was made: the processor's on a CPU, where other work does not count."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._now()

    def __call__(self) -> float:
        return round(self._now() - self._start, 1)

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()
