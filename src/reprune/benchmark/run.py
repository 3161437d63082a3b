"""Running experiments: one run of a method, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from reprune.attacks import Stamp
from reprune.benchmark.record import Record
from reprune.benchmark.recording import Clock, failed, made, verdict
from reprune.benchmark.removal import removal
from reprune.benchmark.settings import configured
from reprune.benchmark.sifting import sift
from reprune.benchmark.spec import Experiment
from reprune.benchmark.stamps import encoded
from reprune.benchmark.subjects import Subject, Subjects
from reprune.detection import Detector
from reprune.precision import autocast
from reprune.types import Progress, silent


def run(
    batch: Sequence[Experiment], subjects: Subjects, *, progress: Progress = silent
) -> list[Record]:
    """The records of experiments whose runs begin alike (`reprune.benchmark.settings.beginning`).

    What is alike is done once. Whatever fails leaves records that say so.

    Args:
        batch: experiments of one beginning.
        subjects: where models and images come from.
        progress: told after each step.
    """
    try:
        subject = subjects.subject(batch[0].model, progress=progress)
        with autocast(subjects.device, batch[0].precision):
            return _TASKS[batch[0].task](batch, subject, subjects, progress)
    except Exception as error:
        return [failed(experiment, error, subjects.device) for experiment in batch]


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


_TASKS = {"removal": removal, "detection": _detection, "filtering": _filtering}
