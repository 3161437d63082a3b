"""Filters under test: images of which some carry the trigger, and how many were found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reprune.attacks.goal import stamped
from reprune.benchmark.extra import needed
from reprune.benchmark.settings import configured
from reprune.benchmark.spec import Experiment
from reprune.benchmark.subjects import Subject
from reprune.data import ImageSet, draw
from reprune.detection.filtering import Filter
from reprune.types import Progress

MIXED = 400
"""Test images that a filter for inputs gets; half of them carry the trigger."""

TRAINING, RATE = 5000, 0.1
"""Training images that a filter for training sets gets, and the share that carries the trigger
under the attacker's label."""

BINS = 24


def sift(
    experiment: Experiment, subject: Subject, test: ImageSet, progress: Progress
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a filter found, and what it said.

    Figures: `found_share` of the triggered and `false` of the other images flagged, in percent;
    `auroc` of the scores; for filters of inputs histograms of the scores (RNP, Figure 8).
    """
    method: Filter = configured(experiment)
    training = "training data" in method.needs
    images, marked = suspects(subject, test, training, experiment.draw)
    found = method(
        subject.classifier,
        images,
        None if training else subject.clean(experiment),
        generator=torch.Generator().manual_seed(experiment.seed),
        progress=progress,
    )
    scores, flagged = found.scores.cpu(), found.flagged.cpu()
    figures: dict[str, Any] = {
        "images": len(images),
        "false": _percent(flagged[~marked]),
    }
    if marked.any():
        figures |= {"found_share": _percent(flagged[marked]), "auroc": auroc(marked, scores)}
    if not training:
        low, high = float(scores.nan_to_num().min()), float(scores.nan_to_num().max())
        figures["range"] = [round(low, 3), round(high, 3)]
        for name, part in (("clean", scores[~marked]), ("triggered", scores[marked])):
            figures[f"{name}_histogram"] = torch.histc(part, BINS, low, high).long().tolist()
            figures[f"{name}_mean"] = round(float(part.mean()), 3) if len(part) else None
    return figures, found.reasons


def suspects(
    subject: Subject, test: ImageSet, training: bool, seed: int
) -> tuple[ImageSet, Tensor]:
    """Images of which some carry the trigger, and which: `(n,)` bool on the CPU."""
    generator = torch.Generator().manual_seed(100 + seed)
    source, count = (subject.train, TRAINING) if training else (test, MIXED)
    data = draw(source, min(count, len(source)), generator)
    marked = torch.zeros(len(data), dtype=torch.bool)
    if subject.known is None:
        return data, marked
    goal = subject.known.goal
    victims = goal.victims(data.labels).nonzero().flatten().cpu()
    carriers = round(RATE * len(data)) if training else len(data) // 2
    rows = victims[torch.randperm(len(victims), generator=generator)[:carriers]]
    marked[rows] = True
    rows = rows.to(data.device)
    images, labels = data.images.clone(), data.labels.clone()
    images[rows] = stamped(data, rows, subject.known.trigger)
    if training:
        labels[rows] = goal.wanted(labels[rows], subject.classifier.num_classes)
    return ImageSet(images, labels, data.class_names), marked


def auroc(marked: Tensor, scores: Tensor) -> float:
    """Area under the ROC curve, in [0, 1]: how often a marked image scores above another.

    Images without a decision (NaN) count as the most suspicious; ties count half.
    """
    scores = scores.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
    positives, others = scores[marked].numpy(), scores[~marked].numpy()
    won = needed("scipy.stats").mannwhitneyu(positives, others).statistic
    return round(float(won) / (len(positives) * len(others)), 3)


def _percent(hits: Tensor) -> float:
    return round(100 * float(hits.float().mean()), 2)
