"""The jobs of the command line, for Python too: a loaded model and images in, a report out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet, draw
from reprune.defense import Defense, Purified
from reprune.defenses import ABL, accuracy_budget
from reprune.detection import (
    Detector,
    Inverted,
    Scan,
    Scanned,
    trigger_images,
    write_inverted,
)
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate, predict
from reprune.files import atomic_directory
from reprune.layers import default_layers
from reprune.models import LoadedModel, model_file, portable_arch, save_weights
from reprune.report import (
    Budget,
    Command,
    Comparison,
    DataInfo,
    Example,
    FeatureMaps,
    Method,
    ModelInfo,
    Report,
    Weights,
    describe,
    feature_maps,
    hardware,
    render_html,
    versions,
)
from reprune.results import Evaluation, Finding, Trace, to_json
from reprune.sample import KnownTrigger, Sample
from reprune.training import Precision, autocast, fastest
from reprune.types import Progress, silent

EXAMPLES = 12
LEFT_OVER = 0.1
"""From this success rate of the recovered trigger on, a repair is called insufficient."""


@dataclass(frozen=True)
class Job:
    """A finished job: the report, its pictures, and what the methods returned."""

    report: Report
    examples: Tensor | None
    recovered: Tensor | None = None
    maps: FeatureMaps | None = None
    purified: Purified | None = None
    inverted: Inverted | None = None


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
    if trace.repaired:
        finding = _with_repair(finding, inverted, sample, model, purified.model)
    clean, attacked = _compare(sample, model, purified.model, known)
    report = _report("purify", loaded, sample, finding, trace)
    budget = accuracy_budget(defense)
    report = replace(
        report,
        method=Method(method, describe(defense)),
        clean=clean,
        attacked=attacked,
        changed=not _same_weights(model, purified.model),
        budget=None if budget is None else Budget("drop", budget),
        data=replace(
            report.data,
            held_out=round(getattr(defense, "holdout", 0) * len(sample.defence)),
        ),
    )
    images, examples = _examples(sample, model, purified.model, known)
    stages = {"original": model, **purified.stages, "pruned": purified.model}
    return Job(
        replace(report, examples=examples),
        images,
        _picture(inverted, finding.target),
        _maps(stages, sample, known) if known else None,
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
    images, examples = _examples(sample, model, None, None)
    picture = _picture(inverted, finding.target)
    return Job(replace(report, examples=examples), images, picture, inverted=inverted)


def write(job: Job, loaded: LoadedModel, output: str | Path) -> Report:
    """Write `report.json` and `report.html`; the repaired model; the recovered triggers.

    The folder appears whole or not at all. A repaired model comes with its card and `model.py`,
    so that the folder is itself a MODEL.

    Returns:
        The report, completed with the hash of the weights that were written.

    Raises:
        OutputError: the folder holds other files, cannot be written, or the disk is full.
    """
    report = job.report
    with atomic_directory(output) as folder:
        if job.purified is not None:
            weights = folder / "model.safetensors"
            save_weights(job.purified.model.network, weights, prefix=loaded.prefix)
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            repaired = Weights("model.safetensors", digest, report.model.original.parameters)
            report = replace(report, model=replace(report.model, repaired=repaired))
            _write_card(loaded, report, folder)
        if job.inverted is not None:
            write_inverted(job.inverted, folder / "triggers")
        text = json.dumps(to_json(report), indent=1, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", "utf-8")
        page = render_html(
            report,
            example_images=job.examples,
            feature_maps=job.maps,
            recovered_trigger=job.recovered,
        )
        (folder / "report.html").write_text(page, "utf-8")
    return report


def _write_card(loaded: LoadedModel, report: Report, folder: Path) -> None:
    model = loaded.classifier
    content = {
        "num_classes": model.num_classes,
        "arch": portable_arch(loaded.arch),
        "arch_args": dict(loaded.arch_args),
        "preprocessing": {
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
        },
        "input_shape": list(report.model.input_shape),
        "repaired_from_sha256": loaded.sha256,
    }
    if report.model.class_names:
        content["class_names"] = list(report.model.class_names)
    (folder / "card.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    file = model_file(loaded.arch)
    if file is not None:
        shutil.copyfile(file, folder / "model.py")


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
) -> Finding:
    """Adds how often the trigger recovered from the original still works after the repair."""
    if finding.target is None or inverted is None:
        return finding
    trigger = inverted.trigger(inverted.classes.index(finding.target))
    was, now = (
        evaluate(model, sample.test, trigger=trigger, target=finding.target).asr
        for model in (before, after)
    )
    if was is None or now is None:
        return finding
    reason = (
        f"the recovered trigger sends {was.share:.1%} of the images to class {finding.target} in "
        f"the original model and {now.share:.1%} in the repaired one; the attacker's own trigger "
        "may differ and fare otherwise"
    )
    if now.share > LEFT_OVER:
        reason += ". The repair did not suffice: do not use the repaired model"
    return replace(finding, reasons=(*finding.reasons, reason))


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


def _examples(
    sample: Sample, before: Classifier, after: Classifier | None, known: KnownTrigger | None
) -> tuple[Tensor | None, tuple[Example, ...]]:
    """A few images, the second half with the trigger where it is known.

    None where images are neither grey nor RGB and cannot be shown.
    """
    if sample.test.shape[0] not in (1, 3):
        return None, ()
    shown = draw(sample.test, EXAMPLES, torch.Generator().manual_seed(sample.seed))
    pixels, marked = shown.pixels().clone(), torch.zeros(len(shown), dtype=torch.bool)
    if known is not None:
        marked[len(shown) // 2 :] = True
        pixels[marked] = known.trigger(pixels[marked])
    data = ImageSet(pixels, shown.labels)
    was = predict(before, data).argmax(1).tolist()
    now = [None] * len(data) if after is None else predict(after, data).argmax(1).tolist()
    rows = zip(shown.labels.tolist(), was, now, marked.tolist(), strict=True)
    return _bytes(pixels), tuple(Example(*row) for row in rows)


def _picture(inverted: Inverted | None, target: int | None) -> Tensor | None:
    """The trigger recovered for `target` on black, uint8 `(c, h, w)`."""
    if target is None or inverted is None or inverted.patterns.shape[1] not in (1, 3):
        return None
    return trigger_images(inverted)[inverted.classes.index(target)]


def _maps(stages: dict[str, Classifier], sample: Sample, known: KnownTrigger) -> FeatureMaps | None:
    """Channel means of one image with the trigger, model by model (RNP, Figure 2)."""
    others = known.goal.victims(sample.test.labels).nonzero().flatten()[:1]
    images = known.trigger(sample.test.pixels(others))
    layers = default_layers(stages["original"], images)
    if not layers:
        return None
    maps = {name: feature_maps(model, images, layers) for name, model in stages.items()}
    return FeatureMaps(maps, _bytes(images))


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.detach().mul(255).round().byte().cpu()
