"""Running experiments: one run of a method, and what is measured of it."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reprune.attacks import Stamp
from reprune.benchmark.reactivation import reactivation
from reprune.benchmark.record import Record
from reprune.benchmark.selection import select
from reprune.benchmark.settings import configured, settings_digest
from reprune.benchmark.sifting import sift
from reprune.benchmark.spec import NONE, Experiment, ModelSpec
from reprune.benchmark.stamps import encoded
from reprune.benchmark.subjects import Subject, Subjects
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense
from reprune.detection import Detector
from reprune.errors import ConfigurationError, RepruneError
from reprune.evaluation import evaluate
from reprune.precision import autocast
from reprune.report import hardware, versions
from reprune.results import Finding
from reprune.sample import KnownTrigger
from reprune.types import Progress, silent


def run(
    batch: Sequence[Experiment], subjects: Subjects, *, progress: Progress = silent
) -> list[Record]:
    """The records of experiments that one run of a method serves (`Experiment.run`).

    Whatever fails leaves records that say so.

    Args:
        batch: experiments of the same run.
        subjects: where models and images come from.
        progress: told after each step.
    """
    try:
        subject = subjects.subject(batch[0].model, progress=progress)
        with autocast(subjects.device, batch[0].precision):
            return _TASKS[batch[0].task](batch, subject, subjects, progress)
    except Exception as error:
        return [failed(experiment, error, subjects.device) for experiment in batch]


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
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def percent(model: Classifier, test: ImageSet, known: KnownTrigger | None) -> dict[str, float]:
    """CA, and with a trigger ASR and RA, in percent."""
    measured = evaluate(
        model,
        test,
        trigger=known.trigger if known else None,
        target=known.goal if known else None,
    )
    return {
        name: round(100 * rate.share, 2)
        for name in ("ca", "asr", "ra")
        if (rate := getattr(measured, name)) is not None
    }


def _removal(
    batch: Sequence[Experiment], subject: Subject, subjects: Subjects, progress: Progress
) -> list[Record]:
    first, model = batch[0].run, subject.classifier
    test = subject.measured(first)
    before = percent(model, test, subject.known)
    begun = [
        Record(key=e.key, experiment=e, status="done", before=before, made=made(subjects.device, e))
        for e in batch
    ]
    if first.method == NONE:
        return [_measured(r, model, before, subject, subjects, test) for r in begun]
    defense = configured(first)
    if not isinstance(defense, Defense):
        raise ConfigurationError(
            f"{first.method} trains anew on poisoned images; the benchmark repairs trained models"
        )
    clock = Clock(subjects.device)
    purified = defense(
        model,
        subject.clean(first),
        generator=torch.Generator().manual_seed(first.seed),
        progress=progress,
    )
    seconds, records = clock(), []
    channels = sum(len(mask.values) for mask in purified.trace.masks)

    def look(repaired: Classifier) -> dict[str, float]:
        return percent(repaired, test, subject.known)

    for record in begun:
        try:
            chosen = select(record.experiment, defense, model, purified, subject.train, look)
            after = chosen.after or look(chosen.model)
        except RepruneError as error:
            records.append(failed(record.experiment, error, subjects.device))
            continue
        figures: dict[str, Any] = {"pruned": chosen.pruned, "channels": channels}
        figures |= {"repaired": purified.trace.repaired, "recovered": sorted(purified.triggers)}
        if purified.scanned is not None:
            figures |= verdict(purified.scanned.finding, subject)
        notes = purified.trace.notes if record.experiment.selection == "defender" else ()
        record = replace(record, figures=figures, notes=notes, seconds=seconds)
        records.append(_measured(record, chosen.model, after, subject, subjects, test))
    return records


def _measured(
    record: Record,
    model: Classifier,
    after: dict[str, float],
    subject: Subject,
    subjects: Subjects,
    test: ImageSet,
) -> Record:
    """The record with what its metrics ask for."""
    experiment, figures, known = record.experiment, dict(record.figures), subject.known
    if known is not None and "floor" in experiment.metrics:
        clean = subjects.classifier(reference(experiment.model))
        figures["floor"] = percent(clean, test, known)["asr"]
    if known is not None and "reactivation" in experiment.metrics:
        figures |= reactivation(model, subject.train, test, known, experiment.seed)
    return replace(record, after=after, figures=figures)


def reference(spec: ModelSpec) -> ModelSpec:
    """The clean model of the same architecture that the floor of the ASR is measured on.

    Raises:
        ConfigurationError: a given model whose spec names none.
    """
    if spec.start is not None:
        return spec.start
    if spec.source is not None:
        raise ConfigurationError(f"no clean model to compare {spec.source} with is known")
    return replace(spec, attack="clean", parameters={})


def _detection(
    batch: Sequence[Experiment], subject: Subject, subjects: Subjects, progress: Progress
) -> list[Record]:
    records = []
    for experiment in batch:
        detector: Detector = configured(experiment)
        clock = Clock(subjects.device)
        scanned = detector(
            subject.classifier,
            subject.clean(experiment),
            generator=torch.Generator().manual_seed(experiment.seed),
            progress=progress,
        )
        seconds, finding = clock(), scanned.finding
        figures = verdict(finding, subject)
        ranked = [s for s in finding.scores if math.isfinite(s.index)]
        figures["scores"] = [[s.label, s.size, round(s.index, 2), round(s.flip, 3)] for s in ranked]
        top, inverted = figures["top"], scanned.inverted
        if inverted is not None and top in inverted.classes:
            stamp = inverted.trigger(inverted.classes.index(top))
            figures["stamp"] = encoded(Stamp(stamp.keep.cpu(), stamp.add.cpu()))
        records.append(_done(experiment, subjects, figures, finding.reasons, seconds))
    return records


def verdict(finding: Finding, subject: Subject) -> dict[str, Any]:
    """What a scan said; `top` is the class that it would name, `None` for all-to-all."""
    ranked = [score for score in finding.scores if math.isfinite(score.index)]
    highest = max(ranked, key=lambda score: score.index).label if ranked else None
    return {
        "verdict": finding.verdict,
        "found": finding.target,
        "strength": finding.strength,
        "signs": {
            s.search: {"class": s.label, "strength": round(s.strength, 3)} for s in finding.signs
        },
        "top": highest if finding.strength is None else finding.suspect,
        "target": subject.known.goal.target if subject.known else None,
    }


def _filtering(
    batch: Sequence[Experiment], subject: Subject, subjects: Subjects, progress: Progress
) -> list[Record]:
    records = []
    for experiment in batch:
        clock = Clock(subjects.device)
        figures, notes = sift(experiment, subject, subject.measured(experiment), progress)
        records.append(_done(experiment, subjects, figures, notes, clock()))
    return records


def _done(
    experiment: Experiment,
    subjects: Subjects,
    figures: dict[str, Any],
    notes: tuple[str, ...],
    seconds: float,
) -> Record:
    """The record of a model or of images that were examined."""
    return Record(
        key=experiment.key,
        experiment=experiment,
        status="done",
        figures=figures,
        notes=notes,
        seconds=seconds,
        made=made(subjects.device, experiment),
    )


_TASKS = {"removal": _removal, "detection": _detection, "filtering": _filtering}


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
