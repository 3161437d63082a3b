"""`Scan`: is the model backdoored, and towards which class?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet, check_defence_data, check_model
from reprune.detection.inversion import Inversion, Inverted, invert
from reprune.results import BackdoorLabel, ClassScore, Finding
from reprune.types import Progress, silent

FEWEST_CLASSES = 4


@dataclass(frozen=True)
class Scanned:
    """What a scan found: the finding with its per-class scores, and the recovered triggers."""

    finding: Finding
    inverted: Inverted


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Trigger inversion for every class; a class that needs far less than the others is a target.

    The anomaly index of a class is how many (robust) standard deviations the logarithm of its
    trigger size lies below the median over the classes; higher is more suspicious. The backdoor
    label of an unlearned model is reported beside it, as evidence that agrees or not: alone it
    decides nothing, for clean models collapse to one class too. With fewer than four classes there
    is no median to speak of, and the verdict stays "undecided".

    Source: Wang et al., "Neural Cleanse", S&P 2019, Section IV-C (there on sizes; the logarithm
    and the floor on the deviation are choices of this package).

    Attributes:
        inversion: settings of the inversion.
        index: anomaly index from which a class is called a target.
        ratio: its trigger must also be at most this share of the median size, in (0, 1).
        clear: a model is called clean if no trigger is smaller than this share of the median
            and no search broke down.
        spread: smallest standard deviation of the log sizes that is believed.
    """

    inversion: Inversion = field(default_factory=Inversion)
    index: float = 3.0
    ratio: float = 0.35
    clear: float = 0.5
    spread: float = 0.2

    def __call__(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        label: BackdoorLabel | None = None,
        progress: Progress = silent,
    ) -> Scanned:
        """Examine `model`; it is never changed.

        Args:
            model: the classifier under suspicion.
            clean: labelled clean images.
            generator: all randomness, a CPU generator.
            label: backdoor label of the unlearned model, where somebody computed it.
            progress: told after each step.

        Raises:
            DataError: data that cannot be used.
            ModelError: outputs that are not logits, or a model at chance.
        """
        clean = clean.to(model.device)
        check_defence_data(clean, model.num_classes)
        check_model(model, clean)
        inverted = invert(
            model,
            clean,
            range(model.num_classes),
            self.inversion,
            generator=generator,
            progress=progress,
        )
        return Scanned(self.judge(inverted, clean.shape[1] * clean.shape[2], label), inverted)

    def judge(self, inverted: Inverted, pixels: int, label: BackdoorLabel | None) -> Finding:
        """The verdict on trigger sizes; a class without a trigger counts as the whole image."""
        indices = anomaly_indices(inverted.sizes, pixels, self.spread)
        sizes = [size if math.isfinite(size) else float(pixels) for size in inverted.sizes]
        middle = median(sizes)
        scores = tuple(
            ClassScore(k, size if math.isfinite(size) else None, index, flip)
            for k, size, index, flip in zip(
                inverted.classes, inverted.sizes, indices, inverted.flips, strict=True
            )
        )
        lost = [k for k, s in zip(inverted.classes, inverted.sizes, strict=True) if math.isnan(s)]
        found = sum(math.isfinite(size) for size in inverted.sizes)
        if found < len(sizes) / 2 and min(sizes) > self.ratio * middle:
            reason = f"a trigger was recovered for only {found} of {len(sizes)} classes"
            return Finding("undecided", (reason, *_broken(lost), *_said(label)), None, scores)
        suspects = [
            k
            for k, size, index in zip(inverted.classes, sizes, indices, strict=True)
            if index >= self.index and size <= self.ratio * middle
        ]
        first = max(range(len(sizes)), key=lambda i: indices[i])
        share = sizes[first] / middle
        evidence = (
            f"class {inverted.classes[first]} needs the smallest trigger: {sizes[first]:.1f} "
            f"pixels, {share:.0%} of the median {middle:.1f} over the classes "
            f"(anomaly index {indices[first]:.1f})"
        )
        if len(sizes) < FEWEST_CLASSES:
            few = f"trigger sizes of only {len(sizes)} classes cannot be compared"
            reasons = (few, evidence, *_broken(lost), *_said(label))
            return Finding("undecided", reasons, None, scores)
        if suspects:
            target = inverted.classes[first]
            reasons = (evidence, *_broken(lost), *_said(label, target))
            return Finding("backdoored", reasons, target, scores)
        if lost:
            return Finding("undecided", (*_broken(lost), evidence, *_said(label)), None, scores)
        if share >= self.clear:
            return Finding(
                "clean", ("no class stands out: " + evidence, *_said(label)), None, scores
            )
        return Finding(
            "undecided",
            (
                evidence + f"; needed: index {self.index:g} and at most {self.ratio:.0%}",
                *_said(label),
            ),
            None,
            scores,
        )


def anomaly_indices(sizes: Sequence[float], pixels: int, spread: float = 0.2) -> tuple[float, ...]:
    r"""How far each size lies below the median: $(\mathrm{med}(\log s) - \log s_k) / \sigma$.

    $\sigma$ is 1.4826 times the median absolute deviation of the log sizes, at least `spread`.
    Infinite sizes count as `pixels`.
    """
    logs = [math.log(max(s, 1e-3) if math.isfinite(s) else pixels) for s in sizes]
    middle = median(logs)
    deviation = max(1.4826 * median(abs(value - middle) for value in logs), spread)
    return tuple((middle - value) / deviation for value in logs)


def _broken(lost: Sequence[int]) -> tuple[str, ...]:
    if not lost:
        return ()
    return (
        f"the outputs became NaN or infinite in the search for class {', '.join(map(str, lost))}",
    )


def _said(label: BackdoorLabel | None, target: int | None = None) -> tuple[str, ...]:
    if label is None:
        return ()
    if target is None or label.label is None:
        return (f"unlearning: {label.reason}",)
    agrees = "agrees" if label.label == target else "points to another class"
    return (f"unlearning {agrees}: {label.reason}",)
