"""Repairs of one model by one method, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from reprune.benchmark.reactivation import reactivation
from reprune.benchmark.record import Record
from reprune.benchmark.recording import Clock, failed, made, verdict
from reprune.benchmark.selection import select
from reprune.benchmark.settings import beginning, configured
from reprune.benchmark.spec import NONE, Experiment, ModelSpec, by_run
from reprune.benchmark.subjects import Subject, Subjects
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense, Purified
from reprune.defenses import Auto
from reprune.errors import ConfigurationError, RepruneError
from reprune.evaluation import evaluate
from reprune.sample import KnownTrigger
from reprune.types import Progress

T = TypeVar("T")


def removal(
    batch: Sequence[Experiment], subject: Subject, subjects: Subjects, progress: Progress
) -> list[Record]:
    """The records of repairs whose runs begin alike: what is alike is done once."""
    test = subject.measured(batch[0])
    before = percent(subject.classifier, test, subject.known)
    purify = _Purifying(subject, subjects, progress)
    records = []
    for served in by_run(batch):
        try:
            done = None if served[0].method == NONE else purify(served[0].run)
        except Exception as error:
            records += [failed(e, error, subjects.device) for e in served]
            continue
        records += [_repaired(e, done, subject, subjects, test, before) for e in served]
    return records


@dataclass(frozen=True)
class _Done:
    """One run of a method, and the seconds that it takes alone."""

    defense: Defense
    purified: Purified
    seconds: float


class _Purifying:
    """Runs of methods on one model; what several of them begin with is done once."""

    def __init__(self, subject: Subject, subjects: Subjects, progress: Progress) -> None:
        self.subject, self.subjects, self.progress = subject, subjects, progress

    def __call__(self, run: Experiment) -> _Done:
        defense = configured(run)
        if not isinstance(defense, Defense):
            raise ConfigurationError(
                f"{run.method} trains anew on poisoned images; the benchmark repairs trained models"
            )
        clock = Clock(self.subjects.device)
        if not isinstance(defense, Auto):
            self.subjects.begun.clear()
            return _Done(defense, self._called(defense, run), clock())
        key, kept = beginning(run).key, self.subjects.begun
        if key not in kept:
            kept.clear()
            kept[key] = self._called(defense.begin, run), clock()
            clock = Clock(self.subjects.device)
        begun, before = kept[key]
        return _Done(defense, defense.finish(begun), round(before + clock(), 1))

    def _called(self, method: Callable[..., T], run: Experiment) -> T:
        return method(
            self.subject.classifier,
            self.subject.clean(run),
            generator=torch.Generator().manual_seed(run.seed),
            progress=self.progress,
        )


def _repaired(
    experiment: Experiment,
    done: _Done | None,
    subject: Subject,
    subjects: Subjects,
    test: ImageSet,
    before: dict[str, float],
) -> Record:
    """The record of an experiment from its run, `None` for no defence."""
    model = subject.classifier
    record = Record(
        key=experiment.key,
        experiment=experiment,
        status="done",
        before=before,
        made=made(subjects.device, experiment),
    )
    if done is None:
        return _measured(record, model, before, subject, subjects, test)

    def look(repaired: Classifier) -> dict[str, float]:
        return percent(repaired, test, subject.known)

    purified = done.purified
    try:
        chosen = select(experiment, done.defense, model, purified, subject.train, look)
        after = chosen.after or look(chosen.model)
    except RepruneError as error:
        return failed(experiment, error, subjects.device)
    channels = sum(len(mask.values) for mask in purified.trace.masks)
    figures: dict[str, Any] = {"pruned": chosen.pruned, "channels": channels}
    figures |= {"repaired": purified.trace.repaired, "recovered": sorted(purified.triggers)}
    if purified.scanned is not None:
        figures |= verdict(purified.scanned.finding, subject)
    notes = purified.trace.notes if experiment.selection == "defender" else ()
    record = replace(record, figures=figures, notes=notes, seconds=done.seconds)
    return _measured(record, chosen.model, after, subject, subjects, test)


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
