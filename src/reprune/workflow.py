"""The jobs of the command line, for Python too: a loaded model and images in, a report out."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense
from reprune.defenses import ABL, accuracy_budget
from reprune.detection import Detector, Inverted, Scan, Scanned
from reprune.detection.signs import PATCHES
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.job import Job, example_images, example_maps, trigger_picture
from reprune.models import LoadedModel
from reprune.precision import Precision, autocast, fastest
from reprune.report import (
    Budget,
    Command,
    Comparison,
    DataInfo,
    Method,
    ModelInfo,
    Report,
    Weights,
    describe,
    hardware,
    versions,
)
from reprune.results import Evaluation, Finding, Trace
from reprune.sample import KnownTrigger, Sample
from reprune.types import Progress, silent

LEFT_OVER = 0.1
"""From this success rate of the recovered trigger on, a repair is called insufficient."""


def purify(
    loaded: LoadedModel,
    sample: Sample,
    *,
    defense: Defense | ABL,
    method: str,
    training: ImageSet | None = None,
    scan: Scan | None = None,
    known: KnownTrigger | None = None,
    precision: Precision = "auto",
    progress: Progress = silent,
) -> Job:
    """Repair the model, examine the original, and report both.

    Args:
        loaded: the model, on the device of the sample.
        sample: the images.
        defense: the method; it gets `sample.defence` only, or `training` only if it trains anew.
        method: its name in the report.
        training: labelled, possibly poisoned, images for a method that trains anew.
        scan: how the original is examined where the method did not; `Scan()` by default.
        known: evaluated before and after, never handed to the method.
        precision: of the method and the scan; `auto` is bfloat16 where the device has units for it.

    Raises:
        RepruneError: whatever the method raises.
        ConfigurationError: training images that are missing, or that the method does not take.
    """
    model = loaded.classifier
    if known is not None:
        known.check(sample.test, model.num_classes)
    check_training(defense, training)
    with _quickly(precision, sample):
        purified = defense(
            model,
            sample.defence if training is None else training,
            generator=torch.Generator().manual_seed(sample.seed),
            progress=progress,
        )
    start = time.perf_counter()
    scanned = purified.scanned or _examine(
        model, sample, (scan or Scan()).given(purified.trace.label), precision, progress=progress
    )
    finding, inverted = scanned.finding, scanned.inverted
    trace = _timed(purified.trace, "examine", start)
    if training is not None:
        trained = (
            f"the model was trained anew on {len(training):,} images of its training data; the "
            "clean images only measure it"
        )
        trace = replace(trace, notes=(*trace.notes, trained))
    elif sample.test is sample.defence:
        flattery = (
            "accuracy is measured on images that the method was fitted on, which flatters it; give "
            "more clean images than --samples for a figure on others"
        )
        trace = replace(trace, notes=(*trace.notes, flattery))
    changed = not _same_weights(model, purified.model)
    if trace.repaired or changed:
        finding, suffices = _with_repair(finding, inverted, sample, model, purified.model)
        if not (suffices or changed):
            trace = replace(trace, notes=(*trace.notes, "the method changed nothing"))
        trace = replace(trace, repaired=trace.repaired and suffices)
    clean, attacked = _compare(sample, model, purified.model, known)
    report = _report("purify", loaded, sample, finding, trace)
    budget = accuracy_budget(defense)
    skipped = () if isinstance(defense, ABL) else defense.skipped
    report = replace(
        report,
        method=Method(method, describe(defense)),
        notes=(*report.notes, *skipped),
        clean=clean,
        attacked=attacked,
        changed=changed,
        budget=None if budget is None else Budget("drop", budget),
        data=replace(
            report.data,
            held_out=round(getattr(defense, "holdout", 0) * len(sample.defence)),
        ),
    )
    images, examples = example_images(sample, model, purified.model, known)
    stages = {"original": model, **purified.stages, "pruned": purified.model}
    return Job(
        replace(report, examples=examples),
        images,
        trigger_picture(inverted, finding.target),
        example_maps(stages, sample, known) if known else None,
        purified,
        inverted,
    )


def check_training(defense: Defense | ABL, training: object | None) -> None:
    """Raises `ConfigurationError` unless training images are given just where they are needed."""
    if (training is not None) == isinstance(defense, ABL):
        return
    raise ConfigurationError(
        f"{defense.title} trains the model anew: it needs its training data (--training-data)"
        if training is None
        else f"{defense.title} takes clean images only: leave out the training data"
    )


def scan_model(
    loaded: LoadedModel,
    sample: Sample,
    *,
    detector: Detector | None = None,
    name: str = "scan",
    precision: Precision = "auto",
    progress: Progress = silent,
) -> Job:
    """Examine the model: by default invert a trigger for each class beside the backdoor label.

    Args:
        loaded: the model, on the device of the sample.
        sample: the images.
        detector: the method; `Scan()` by default.
        name: its name in the report.
        precision: of the method, as in `purify`.
        progress: told after each step.

    Raises:
        RepruneError: data or a model that cannot be used, or unlearning that does not converge.
    """
    model, detector = loaded.classifier, detector or Scan()
    scanned = _examine(model, sample, detector, precision, progress=progress)
    finding, inverted = scanned.finding, scanned.inverted
    report = replace(
        _report("scan", loaded, sample, finding, scanned.trace),
        method=Method(name, describe(detector)),
        clean=_compare(sample, model, None)[0],
    )
    images, examples = example_images(sample, model, None, None)
    picture = trigger_picture(inverted, finding.target)
    return Job(replace(report, examples=examples), images, picture, inverted=inverted)


def _same_weights(first: Classifier, second: Classifier) -> bool:
    others = second.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())


def _examine(
    model: Classifier,
    sample: Sample,
    detector: Detector,
    precision: Precision,
    *,
    progress: Progress,
) -> Scanned:
    generator = torch.Generator().manual_seed(sample.seed)
    with _quickly(precision, sample):
        return detector(model, sample.defence, generator=generator, progress=progress)


def _quickly(precision: Precision, sample: Sample) -> AbstractContextManager[object]:
    device = sample.defence.device
    return autocast(device, fastest(device) if precision == "auto" else precision)


def _with_repair(
    finding: Finding,
    inverted: Inverted | None,
    sample: Sample,
    before: Classifier,
    after: Classifier,
) -> tuple[Finding, bool]:
    """Adds how often the trigger recovered from the original still works after the repair.

    Second is whether that is no more than `LEFT_OVER`, for a patch that accuses: what other
    searches accuse of may need a patch as large as those that lead to a class of any model.
    """
    place = None if inverted is None else inverted.place(finding.target)
    if inverted is None or place is None:
        return finding, True
    trigger = inverted.trigger(place)
    was, now = (
        evaluate(model, sample.test, trigger=trigger, target=finding.target).asr
        for model in (before, after)
    )
    if was is None or now is None:
        return finding, True
    reason = (
        f"the recovered trigger sends {was.share:.1%} of the images to class {finding.target} in "
        f"the original model and {now.share:.1%} in the repaired one; the attacker's own trigger "
        "may differ and fare otherwise"
    )
    accuses = any(
        sign.search == PATCHES and sign.label == finding.target and sign.strength >= 1
        for sign in finding.signs
    )
    suffices = now.share <= LEFT_OVER or not accuses
    if not suffices:
        reason += ". The repair did not suffice: do not use the written model"
    return replace(finding, reasons=(*finding.reasons, reason)), suffices


def _report(
    command: Command, loaded: LoadedModel, sample: Sample, finding: Finding, trace: Trace
) -> Report:
    return Report(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        finding=finding,
        method=Method(command),
        model=model_info(loaded, sample.defence),
        data=DataInfo(sample.source, len(sample.defence), seed=sample.seed),
        trace=trace,
        versions=versions(),
        hardware=hardware(sample.defence.device),
        notes=loaded.notes,
    )


def model_info(loaded: LoadedModel, data: ImageSet) -> ModelInfo:
    """The classifier as a report names it; class names of the card, else of the data."""
    model = loaded.classifier
    names = tuple(loaded.card.class_names or data.class_names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelInfo(
        architecture=loaded.arch,
        input_shape=data.shape,
        num_classes=model.num_classes,
        original=Weights(str(loaded.weights_path), loaded.sha256, parameters),
        class_names=names if len(names) == model.num_classes else (),
    )


def _timed(trace: Trace, phase: str, start: float) -> Trace:
    seconds = trace.seconds | {phase: round(time.perf_counter() - start, 3)}
    return replace(trace, seconds=seconds)


def _compare(
    sample: Sample, before: Classifier, after: Classifier | None, known: KnownTrigger | None = None
) -> tuple[Comparison, Comparison | None]:
    """Both models on clean images, and with the known trigger if there is one."""
    trigger, target = (known.trigger, known.goal) if known else (None, None)

    def measured(model: Classifier) -> Evaluation:
        return evaluate(model, sample.test, trigger=trigger, target=target)

    def plain(result: Evaluation) -> Evaluation:
        return replace(result, target=None, asr=None, ra=None, source=None)

    was, now = measured(before), None if after is None else measured(after)
    clean = Comparison(sample.described, plain(was), now and plain(now))
    return clean, Comparison(sample.described, was, now, known.source) if known else None
