"""The job of `reprune filter`, for Python too: which of these images carry a trigger?"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from reprune.data import ImageSet, check_defence_data
from reprune.data.suspects import Suspects
from reprune.detection.filtering import Filter, Filtered
from reprune.errors import DataError
from reprune.evaluation import predict
from reprune.files import atomic_directory
from reprune.models import LoadedModel
from reprune.report import DataInfo, Method, describe, hardware, versions
from reprune.report.filter_page import render_filter
from reprune.report.filter_report import Examined, FilterReport, Histogram
from reprune.results import Verdict, to_json
from reprune.sample import Sample
from reprune.types import Progress, silent
from reprune.workflow import model_info

SHOWN = 24
BINS = 40
FOUND, EXPLAINED = 0.001, 0.05
"""Chance of so many false rejections: below the first triggers are found, above the second not."""


@dataclass(frozen=True)
class Sifted:
    """A finished filter: the report, every image's row, pictures of the most suspicious ones."""

    report: FilterReport
    rows: tuple[Examined, ...]
    pictures: Tensor | None


def sift(
    loaded: LoadedModel,
    suspects: Suspects,
    clean: Sample | None,
    *,
    detector: Filter,
    method: str,
    source: str,
    seed: int,
    progress: Progress = silent,
) -> Sifted:
    """Score the images and say how many carry a trigger.

    Args:
        loaded: the model, on the device of the images.
        suspects: the images to examine.
        clean: clean images, for a method that needs them; `clean.defence` is used.
        detector: the method.
        method: its name in the report.
        source: where the examined images are from.
        seed: of all randomness.

    Raises:
        RepruneError: images that do not fit the model, and whatever the method raises.
    """
    data = suspects.data.to(loaded.classifier.device)
    check_suspects(loaded, suspects, labelled="training data" in detector.needs)
    filtered = detector(
        loaded.classifier,
        data,
        None if clean is None else clean.defence,
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )
    found, reasons = judge(filtered, detector)
    rows = _rows(suspects, predict(loaded.classifier, data).argmax(1), filtered)
    order = sorted(rows, key=lambda row: math.inf if row.score is None else row.score, reverse=True)
    top = tuple(order[:SHOWN])
    report = FilterReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=found,
        reasons=reasons,
        images=len(data),
        flagged=int(filtered.flagged.sum()),
        source=source,
        threshold=filtered.threshold,
        scale=getattr(detector, "scale", "higher is more suspicious"),
        histogram=_histogram(filtered),
        suspects=top,
        method=Method(method, describe(detector)),
        model=model_info(loaded, data),
        clean=None if clean is None else DataInfo(clean.source, len(clean.defence), seed=seed),
        trace=filtered.trace,
        seed=seed,
        versions=versions(),
        hardware=hardware(data.device),
        notes=loaded.notes,
    )
    return Sifted(report, rows, _pictures(data, top))


def check_suspects(loaded: LoadedModel, suspects: Suspects, *, labelled: bool) -> None:
    """Raises `DataError` where the images do not fit the model, or lack the labels needed."""
    data, model = suspects.data, loaded.classifier
    statistics, shape = model.mean.shape[1], loaded.card.input_shape
    if statistics not in (1, data.shape[0]):
        raise DataError(
            f"the examined images have {data.shape[0]} channels, but the model's mean and std are "
            f"for {statistics}; convert the images to the model's channels"
        )
    if shape is not None and data.shape != shape:
        raise DataError(
            f"the model takes images of (channels, height, width) {shape}, got {data.shape}; "
            "pass --image-size, or convert the images to the model's channels"
        )
    if labelled:
        if not suspects.labelled:
            raise DataError("this method needs the labels of the examined images")
        check_defence_data(data, model.num_classes, min_per_class=0, input_shape=shape)


def judge(filtered: Filtered, detector: Filter) -> tuple[Verdict, tuple[str, ...]]:
    """Whether there are images with triggers at all, and why.

    With a threshold that a share of clean images may exceed: triggers are found if so many flagged
    images have a chance below 0.1 % among clean images, none are if it is at least 5 %. A method
    that names poisoned groups decides by itself; one that flags a fixed share decides nothing.
    """
    undecided = int(filtered.scores.isnan().sum())
    flagged, total = int(filtered.flagged.sum()) - undecided, len(filtered.flagged)
    rate = getattr(detector, "false_rejection", None)
    verdict: Verdict
    reasons = filtered.reasons
    if rate is not None and filtered.threshold is not None and len(filtered.clean_scores):
        beyond = int((filtered.clean_scores > filtered.threshold).sum())
        chance = chance_of(flagged, total - undecided, len(filtered.clean_scores), beyond)
        verdict = "undecided"
        if chance < FOUND:
            verdict = "backdoored"
        elif chance >= EXPLAINED:
            verdict = "clean"
        reasons += (
            f"among as many clean images about {rate * total:.1f} would be flagged; {flagged} or "
            f"more with a chance of {_percent(chance)}",
        )
    elif getattr(detector, "decides", False):
        verdict = "backdoored" if flagged else "clean"
    else:
        verdict = "undecided"
        reasons += (
            "the method flags a fixed share of any data, so this does not say whether there are "
            "images with triggers: look at the flagged ones",
        )
    if undecided:
        verdict = "undecided" if verdict == "clean" else verdict
    return verdict, reasons


def chance_of(flagged: int, examined: int, clean: int, beyond: int) -> float:
    r"""The chance that at least `flagged` of `examined` clean images exceed the threshold.

    A threshold that k - 1 = `beyond` of m clean scores exceed has itself an
    error: the share of fresh clean images beyond it is Beta(k, m + 1 - k) distributed, and their
    number beta-binomial. A plain binomial bound would call large clean sets poisoned.
    """
    k = min(beyond + 1, clean)
    a, b = float(k), float(clean + 1 - k)
    if flagged <= 0:
        return 1.0
    x = torch.arange(flagged, examined + 1, dtype=torch.float64)
    n = torch.tensor(float(examined), dtype=torch.float64)
    logs = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    logs += torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(n + a + b)
    logs += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return min(float(logs.logsumexp(0).exp()), 1.0) if len(x) else 0.0


def write_sifted(sifted: Sifted, output: str | Path) -> None:
    """Write `images.csv`, `report.json` and `report.html`; the folder appears whole or not at all.

    Raises:
        OutputError: the folder holds other files, cannot be written, or the disk is full.
    """
    with atomic_directory(output) as folder:
        with (folder / "images.csv").open(
            "w", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("row", "file", "label", "prediction", "score", "flagged"))
            for row in sifted.rows:
                score = "" if row.score is None else f"{row.score:.6g}"
                label = "" if row.label is None else row.label
                values = (row.row, row.file or "", label, row.prediction, score, int(row.flagged))
                table.writerow(values)
        text = json.dumps(to_json(sifted.report), indent=1, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", "utf-8")
        page = render_filter(sifted.report, pictures=sifted.pictures)
        (folder / "report.html").write_text(page, "utf-8")


def _rows(suspects: Suspects, predictions: Tensor, filtered: Filtered) -> tuple[Examined, ...]:
    labels = suspects.data.labels.tolist() if suspects.labelled else [None] * len(predictions)
    files = suspects.files or (None,) * len(predictions)
    values = zip(
        files,
        labels,
        predictions.tolist(),
        filtered.scores.tolist(),
        filtered.flagged.tolist(),
        strict=True,
    )
    return tuple(
        Examined(row, file, label, predicted, score if math.isfinite(score) else None, flagged)
        for row, (file, label, predicted, score, flagged) in enumerate(values)
    )


def _histogram(filtered: Filtered) -> Histogram | None:
    examined = filtered.scores[filtered.scores.isfinite()].double()
    clean = filtered.clean_scores.double()
    every = torch.cat([examined, clean])
    if not len(every):
        return None
    low, high = float(every.min()), float(every.max())
    high = high if high > low else low + 1e-6
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)

    def counts(scores: Tensor) -> tuple[int, ...]:
        bins = torch.bucketize(scores, edges[1:-1], right=True)
        return tuple(torch.bincount(bins, minlength=BINS).tolist())

    return Histogram(tuple(edges.tolist()), counts(examined), counts(clean) if len(clean) else ())


def _pictures(data: ImageSet, rows: tuple[Examined, ...]) -> Tensor | None:
    """The images of `rows`, uint8; None where images are neither grey nor RGB."""
    if data.shape[0] not in (1, 3):
        return None
    index = torch.tensor([row.row for row in rows], device=data.device)
    return data.pixels(index).nan_to_num(0).mul(255).round().byte().cpu()


def _percent(chance: float) -> str:
    return "less than 0.01 %" if chance < 1e-4 else f"{100 * chance:.2g} %"
