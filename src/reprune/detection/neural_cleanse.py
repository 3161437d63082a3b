"""`NeuralCleanse`: a class that needs a far smaller trigger than the others is a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Gain
from reprune.detection.detector import Detector, Scanned
from reprune.detection.inversion import Inversion, Inverted, invert
from reprune.detection.unlearned_label import unlearned
from reprune.errors import ConfigurationError
from reprune.results import BackdoorLabel, ClassScore, Epoch, Finding, Trace, TriggerState
from reprune.rnp import RNP, Unlearning, check_unlearning, unlearning_passes
from reprune.types import Progress

FEWEST_CLASSES = 4
"""With fewer there is no median to speak of, and the verdict stays "undecided"."""
MOST = 0.9
"""Share of the classes that need a trigger before a model is called clean."""
SHORTCUT = 0.35
"""Where most classes have no trigger, one of at most this share of the median is still evidence."""


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Detector):
    r"""Trigger inversion for every class; a class that needs far less than the others is a target.

    With $v_k$ the size of the trigger of class k in pixels, or its logarithm, the anomaly index is

    $$a_k = \frac{\mathrm{med}(v) - v_k}{\max(1.4826\,\mathrm{med}|v - \mathrm{med}(v)|, s)}$$

    with $s$ = `spread`; higher is more suspicious. A class whose search ended without a trigger
    counts as the whole picture in the median; one that is reached without a trigger ("empty") or
    whose search broke (NaN) not at all. None of these is evidence for a clean model: a NaN or an
    empty trigger forbids that verdict, and so do more than a tenth of the classes without a
    trigger. An unlearned model that answers one class alone leaves that class "empty": then the
    reasons name it, and the verdict is undecided. Where less than half of the classes have a
    trigger, nothing but one of at most 0.35 (`SHORTCUT`) of the median decides.

    With `unlearning` all this happens on the unlearned model ("NU+NC"), whose favourite class is
    reported beside it.

    Source: Wang et al., "Neural Cleanse", S&P 2019, Section IV-C; on the unlearned model RNP,
    Appendix D.2 and D.3. The logarithm, its floor, `ratio` and `clear` are choices of this package.

    Attributes:
        inversion: settings of the inversion.
        log: compare logarithms of the sizes.
        index: anomaly index from which a class is called a target.
        ratio: its trigger must also be at most this share of the median size, in (0, 1].
        clear: a model is called clean if no trigger is smaller than this share of the median, in
            [0, 1].
        spread: smallest deviation that is believed, in pixels or, with `log`, of the logarithms.
        unlearning: examine the unlearned model; `None` examines the model itself.
    """

    source_paper: ClassVar[str] = "Wang et al., S&P 2019"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger")

    inversion: Inversion = field(default_factory=Inversion)
    log: bool = True
    index: float = 3.0
    ratio: float = 0.35
    clear: float = 0.5
    spread: float = 0.2
    unlearning: Unlearning | None = None

    @property
    def title(self) -> str:
        return "Neural Cleanse" + (" on the unlearned model" if self.unlearning else "")

    @classmethod
    def paper(cls, *, on_unlearned: bool = False) -> NeuralCleanse:
        """The published method: index on the sizes themselves, threshold 2, small side only.

        Args:
            on_unlearned: NU+NC with the unlearning of the RNP paper (Table 16).

        Choices: deviations below 0.001 pixels are not believed, and fewer than four classes stay
        undecided.
        """
        return cls(
            inversion=Inversion.paper(),
            log=False,
            index=2.0,
            ratio=1.0,
            clear=0.0,
            spread=1e-3,
            unlearning=RNP.paper().unlearning if on_unlearned else None,
        )

    @classmethod
    def on_unlearned(cls) -> NeuralCleanse:
        """NU+NC with the defaults of this package."""
        return cls(unlearning=Unlearning())

    @property
    def trains(self) -> bool:
        return self.unlearning is not None

    def check(self) -> None:
        self.inversion.check()
        if self.unlearning is not None:
            check_unlearning(self.unlearning)
        for name in ("index", "spread"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)}")
        if not (0 < self.ratio <= 1 and 0 <= self.clear <= 1):
            raise ConfigurationError(
                f"ratio must lie in (0, 1] and clear in [0, 1], got {self.ratio} and {self.clear}"
            )

    def passes(self, images: int, classes: int) -> float:
        passes = 1 + self.inversion.passes(images, classes)
        if self.unlearning is not None:
            passes += unlearning_passes(self.unlearning, images)
        return passes

    def examine(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Scanned:
        clock = Clock()
        label: BackdoorLabel | None = None
        phases: dict[str, tuple[Epoch, ...]] = {}
        if self.unlearning is not None:
            with clock("unlearn"):
                (model,), phases, label = unlearned(
                    model, clean, self.unlearning, generator=generator, progress=progress
                )
        with clock("invert"):
            inverted = invert(
                model,
                clean,
                range(model.num_classes),
                self.inversion,
                generator=generator,
                progress=progress,
            )
        trace = Trace(phases=phases, label=label, seconds=clock.seconds)
        return Scanned(self.judge(inverted, label), inverted, trace)

    def judge(self, inverted: Inverted, label: BackdoorLabel | None = None) -> Finding:
        """The verdict on trigger sizes; `label` is evidence that agrees or not, and no more."""
        pixels = inverted.masks.shape[2] * inverted.masks.shape[3]
        empty = [k for k, state in _by_class(inverted) if state == "empty"]
        lost = [k for k, state in _by_class(inverted) if state == "broken"]
        found = sum(state == "found" for state in inverted.states)
        sizes = {
            k: size if math.isfinite(size) else float(pixels)
            for k, size in zip(inverted.classes, inverted.sizes, strict=True)
            if k not in empty and k not in lost
        }
        values = anomaly_indices(list(sizes.values()), pixels, self.spread, log=self.log)
        indices = dict.fromkeys(inverted.classes, 0.0) | dict(zip(sizes, values, strict=True))
        scores = tuple(
            ClassScore(k, size if math.isfinite(size) else None, indices[k], flip, state)
            for (k, state), size, flip in zip(
                _by_class(inverted), inverted.sizes, inverted.flips, strict=True
            )
        )

        def undecided(*reasons: str) -> Finding:
            return Finding("undecided", (*reasons, *_said(label)), None, scores)

        doubts = (*_broken(lost), *_empty(empty))
        if not sizes:
            return undecided(*doubts)
        middle = median(sizes.values())
        striking = min(self.ratio, SHORTCUT) * middle
        if found < len(inverted.classes) / 2 and min(sizes.values()) > striking:
            count = len(inverted.classes)
            reason = f"a trigger was recovered for only {found} of {count} classes"
            return undecided(reason, *doubts)
        first = max(sizes, key=lambda k: indices[k])
        share = sizes[first] / middle
        evidence = (
            f"class {first} needs the smallest trigger: {sizes[first]:.1f} pixels, {share:.0%} of "
            f"the median {middle:.1f} over the classes (anomaly index {indices[first]:.1f})"
        )
        if len(sizes) < FEWEST_CLASSES:
            few = f"trigger sizes of only {len(sizes)} classes cannot be compared"
            return undecided(few, evidence, *doubts)
        if indices[first] >= self.index and share <= self.ratio:
            reasons = (evidence, *doubts, *_said(label, first))
            return Finding("backdoored", reasons, first, scores)
        if found < MOST * len(inverted.classes):
            missed = [
                k for k, state in _by_class(inverted) if state in ("never flips", "saturated")
            ]
            doubts += (f"no trigger was recovered for class {', '.join(map(str, missed))}",)
        if doubts:
            return undecided(*doubts, evidence)
        if share >= self.clear:
            reasons = ("no class stands out: " + evidence, *_said(label))
            return Finding("clean", reasons, None, scores)
        return undecided(evidence + f"; needed: index {self.index:g} and at most {self.ratio:.0%}")


def anomaly_indices(
    sizes: Sequence[float], pixels: int, spread: float = 0.2, *, log: bool = True
) -> tuple[float, ...]:
    r"""How far each size lies below the median: $(\mathrm{med}(v) - v_k) / \sigma$.

    $v$ is the logarithm of the sizes, or with `log=False` the sizes themselves, and $\sigma$ 1.4826
    times its median absolute deviation, at least `spread`. Infinite sizes count as `pixels`.
    """
    if not sizes:
        return ()
    values = [s if math.isfinite(s) else float(pixels) for s in sizes]
    if log:
        values = [math.log(max(s, 1e-3)) for s in values]
    middle = median(values)
    deviation = max(1.4826 * median(abs(value - middle) for value in values), spread)
    return tuple((middle - value) / deviation for value in values)


def _by_class(inverted: Inverted) -> list[tuple[int, TriggerState]]:
    return list(zip(inverted.classes, inverted.states, strict=True))


def _broken(lost: Sequence[int]) -> tuple[str, ...]:
    if not lost:
        return ()
    return (
        f"the outputs became NaN or infinite in the search for class {', '.join(map(str, lost))}",
    )


def _empty(empty: Sequence[int]) -> tuple[str, ...]:
    if not empty:
        return ()
    return (f"images reach class {', '.join(map(str, empty))} without any trigger",)


def _said(label: BackdoorLabel | None, target: int | None = None) -> tuple[str, ...]:
    if label is None:
        return ()
    if target is None or label.label is None:
        return (f"unlearning: {label.reason}",)
    agrees = "agrees" if label.label == target else "points to another class"
    return (f"unlearning {agrees}: {label.reason}",)
