"""`Auto`: look for a backdoor, and teach the model to ignore the triggers that were found."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar, Literal

import torch

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Defense, Gain, Purified, check_holdout, hold_out
from reprune.defenses.distilling import Distilling, Lesson, distil, interpolated
from reprune.detection import (
    Evidence,
    FamilyName,
    Joint,
    Recovered,
    Scan,
    Scanned,
    invert_jointly,
)
from reprune.detection.joint import check_families, flip_share
from reprune.errors import ConfigurationError, ConvergenceError, RepruneError, TimeLimitError
from reprune.evaluation import fitting_augmentation
from reprune.masks import ChannelMask
from reprune.results import Epoch, Trace
from reprune.rnp import Judge
from reprune.types import Progress

Effort = Literal["low", "normal", "high"]

SHARES = tuple(i / 8 for i in range(1, 9))
"""Shares of the way from the original weights to the repaired ones that are tried."""

INNOCENTS = 5
"""Classes whose natural triggers say how large a trigger has to be without a backdoor."""


@dataclass(frozen=True, kw_only=True)
class Auto(Defense):
    r"""Look for a backdoor; if there may be one, recover triggers and distil them out.

    1. *Scan* the model (`Scan`). A model judged clean comes back bit by bit.
    2. *Recover* triggers of several families for the suspected classes: patches from the model
       alone, added pictures and filters from it together with its unlearned copies. Those that
       work on the model are kept; of each family one is kept apart and only judges.
    3. *Distil* (`distil`): a copy learns to answer triggered images as the original answers them
       without the trigger. Triggers smaller than natural ones are exaggerated up to those, since an
       attacker's trigger works by far and the smallest one barely. While the triggers that judge
       still work on the copy, fresh ones are recovered from it and join.
    4. *Step back* towards the original weights, as far as the triggers that judge stay harmless.

    What guards the accuracy is the paired drop on clean images that nothing was fitted to: where
    the repair costs more than `max_accuracy_drop`, it goes back further, and if that is not
    enough, the model comes back unchanged. A phase that diverges, or the time limit, ends with the
    best model so far, and the notes say so.

    Source: this package. Unlearning from RNP (Li et al., ICML 2023), inversion after Neural
    Cleanse (Wang et al., S&P 2019), stepping back after Wortsman et al., "Robust fine-tuning of
    zero-shot models", CVPR 2022.

    Attributes:
        scan: step 1.
        families: of step 2.
        joint: the searches of step 2.
        lessons: triggers of each family that repair, beside the one that judges.
        suspects: classes at most.
        min_flip: share of the images that a trigger must send to its class to be kept.
        strongest: how many times a trigger is exaggerated at most.
        distilling: step 3.
        rounds: how often step 3 is done at most.
        left_over: the largest share of the images that a judging trigger may still move.
        holdout: share of the clean images that only guard and judge, in (0, 1).
        max_accuracy_drop: of the guard, in [0, 1].
        time_limit: seconds after which the method ends with what it has; `None` for none.
    """

    title: ClassVar[str] = "Scan, and distillation from the triggers of what was found"
    source_paper: ClassVar[str] = "this package"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger", "removal")

    scan: Scan = field(default_factory=Scan)
    families: tuple[FamilyName, ...] = ("patch", "additive", "filter")
    joint: Joint = field(default_factory=Joint)
    lessons: int = 2
    suspects: int = 3
    min_flip: float = 0.5
    strongest: float = 3.0
    distilling: Distilling = field(default_factory=Distilling)
    rounds: int = 2
    left_over: float = 0.1
    holdout: float = 0.2
    max_accuracy_drop: float = 0.05
    time_limit: float | None = None

    @classmethod
    def effort(cls, level: Effort, time_limit: float | None = None) -> Auto:
        """The settings of an effort.

        "low" unlearns one copy, leaves out filters and distils half as long; "high" unlearns four,
        recovers twice as many triggers and distils twice as long, up to four times.

        Raises:
            ConfigurationError: no such effort.
        """
        auto = cls(time_limit=time_limit)
        if level == "normal":
            return auto
        if level == "low":
            return replace(
                auto,
                scan=replace(auto.scan, exposures=1),
                families=("patch", "additive"),
                distilling=replace(auto.distilling, steps=auto.distilling.steps // 2),
                rounds=1,
            )
        if level == "high":
            return replace(
                auto,
                scan=replace(auto.scan, exposures=4),
                joint=replace(auto.joint, images=2 * auto.joint.images),
                lessons=2 * auto.lessons,
                distilling=replace(auto.distilling, steps=2 * auto.distilling.steps),
                rounds=4,
            )
        raise ConfigurationError(f"effort must be low, normal or high, got {level!r}")

    def check(self) -> None:
        self.scan.check()
        self.joint.check()
        self.distilling.check()
        check_families(self.families)
        check_holdout(self.holdout)
        for name in ("lessons", "suspects", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_flip", "left_over", "max_accuracy_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 1 <= self.strongest < math.inf:
            raise ConfigurationError(f"strongest must be at least 1, got {self.strongest}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ConfigurationError(f"time_limit must be positive, got {self.time_limit}")

    def passes(self, images: int, classes: int) -> float:
        fitting = 1 - self.holdout
        count = round(fitting * images)
        one = self.joint.passes(count, 1)
        searches = len(self.families) * self.suspects * (self.lessons + 1)
        again = (self.rounds - 1) * len(self.families) * self.suspects
        found = fitting * one * (searches + again + INNOCENTS)
        repair = fitting * self.rounds * self.distilling.passes(count)
        judged = 3 * self.suspects * self.holdout * (self.rounds + len(SHARES))
        return self.scan.passes(images, classes) + found + repair + judged + 2

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        heldout, fitting = hold_out(clean, self.holdout, generator)
        run = _Run(self, model, fitting, heldout, generator, _until(progress, self.time_limit))
        try:
            run.look(clean)
        except TimeLimitError as late:
            run.notes.append(f"{late}, before there was a verdict")
            return run.result(None)
        if not run.suspects:
            run.notes.append("judged clean: the model is returned as it came")
            return run.result(None)
        repaired = run.repair()
        if repaired is not None:
            repaired = run.step_back(repaired)
        return run.result(repaired)


@dataclass(frozen=True)
class _Kept:
    """A recovered trigger: of which family, how large, for which class, as a lesson."""

    family: FamilyName
    size: float
    label: int
    lesson: Lesson

    def strong(self, images: torch.Tensor) -> torch.Tensor:
        """The trigger as strong as the lesson makes it."""
        return self.lesson.apply(images, self.lesson.strongest)


class _Run:
    """One model on its way."""

    def __init__(
        self,
        settings: Auto,
        model: Classifier,
        fitting: ImageSet,
        heldout: ImageSet,
        generator: torch.Generator,
        progress: Progress,
    ) -> None:
        self.settings, self.model = settings, model
        self.fitting, self.heldout = fitting, heldout
        self.generator, self.progress = generator, progress
        self.clock = Clock()
        self.notes: list[str] = []
        self.phases: dict[str, Sequence[Epoch]] = {}
        self.suspects: list[int] = []
        self.evidence: Evidence | None = None
        self.scanned: Scanned | None = None
        self.judges: list[_Kept] = []
        self.natural: dict[FamilyName, float] = {}

    def look(self, clean: ImageSet) -> None:
        """Step 1: evidence, verdict and suspects.

        Raises:
            TimeLimitError: no time is left.
            ConvergenceError: the search for triggers is impossible.
        """
        scan = self.settings.scan
        state = self.generator.get_state()
        try:
            evidence = scan.gather(
                self.model, clean, generator=self.generator, progress=self.progress
            )
        except ConvergenceError as error:
            self.notes.append(f"no copy could be unlearned, so that only triggers speak: {error}")
            self.generator.set_state(state)
            evidence = replace(scan, unlearning=None).gather(
                self.model, clean, generator=self.generator, progress=self.progress
            )
        self.evidence, self.scanned = evidence, scan.judge(evidence)
        self.phases |= evidence.phases
        self.suspects = scan.suspects(evidence)[: self.settings.suspects]

    def repair(self) -> Classifier | None:
        """Steps 2 and 3; `None` where there is nothing to repair with."""
        student: Classifier | None = None
        try:
            lessons = self._recover()
            if not lessons:
                self.notes.append(
                    "no trigger was recovered that works on the model: it is returned unchanged"
                )
                return None
            for attempt in range(1, self.settings.rounds + 1):
                student = self._distil(student or self.model, lessons, attempt)
                worst = self._moved(student)
                self.notes.append(
                    f"distilled on {len(lessons)} triggers: those kept apart move {worst:.0%} of "
                    "the other images"
                )
                if worst <= self.settings.left_over or attempt == self.settings.rounds:
                    break
                lessons += self._fresh(student)
        except RepruneError as error:
            ending = "the model is returned unchanged" if student is None else "the repair ends"
            self.notes.append(f"{error}: {ending}")
        return student

    def step_back(self, repaired: Classifier) -> Classifier | None:
        """Step 4, and the guard; `None` where the repair costs too much."""
        moved = []
        with self.clock("step back"):
            between = [interpolated(self.model, repaired, share) for share in SHARES]
            moved = [self._moved(one) for one in between]
            floor = max(moved[-1], self.settings.left_over / 2)
            enough = next(i for i in range(len(SHARES)) if max(moved[i:]) <= floor)
            judge = Judge(
                self.model,
                self.heldout,
                budget=5 * len(self.heldout),
                augmentation=fitting_augmentation(self.model, self.fitting),
                generator=self.generator,
            )
            limit = self.settings.max_accuracy_drop
            for i in range(enough, -1, -1):
                drop = judge(between[i], threshold=0.0, channels=0).drop
                if drop <= limit:
                    self.notes.append(
                        f"weights {SHARES[i]:.0%} of the way from the original to the distilled "
                        f"ones: {100 * drop:+.1f} points of accuracy lost on held-out images, "
                        f"{moved[i]:.0%} of the other images moved by a trigger kept apart"
                        + ("; what the guard allows, not what the triggers ask" * (i < enough))
                    )
                    return between[i]
        self.notes.append(
            f"every share of the repair costs more than {100 * limit:.1f} points on held-out "
            "images: the model is returned unchanged"
        )
        return None

    def result(self, repaired: Classifier | None) -> Purified:
        evidence, scanned = self.evidence, self.scanned
        trace = replace(
            scanned.trace if scanned else Trace(),
            phases={name: tuple(epochs) for name, epochs in self.phases.items()},
            notes=tuple(self.notes),
            repaired=repaired is not None or (scanned is not None and not self.suspects),
        )
        trace = replace(trace, seconds=trace.seconds | self.clock.seconds)
        shown = {
            k.label: k.lesson.trigger for k in self.judges if isinstance(k.lesson.trigger, Stamp)
        }
        return Purified(
            repaired or self.model.clone().eval(),
            ChannelMask({}),
            trace,
            {"unlearned": evidence.exposed[0]} if evidence and evidence.exposed else {},
            shown,
            scanned,
        )

    def _search(self, model: Classifier, classes: Sequence[int], family: FamilyName) -> Recovered:
        """Triggers for these classes, which may repeat: in the model alone, or in copies, too."""
        exposed = self.evidence.exposed if self.evidence else ()
        alone = family == "patch" or not exposed
        settings = replace(self.settings.joint, weight=0.0) if alone else self.settings.joint
        with self.clock("recover"):
            return invert_jointly(
                model,
                exposed or (model,),
                self.fitting,
                classes,
                family,
                settings,
                generator=self.generator,
                progress=self.progress,
            )

    def _recover(self) -> list[Lesson]:
        """Triggers that work on the model, one of each class and family kept apart to judge."""
        self._measure_natural()
        count = self.settings.lessons + 1
        lessons = []
        for family in self.settings.families:
            found = self._search(self.model, self.suspects * count, family)
            for label in self.suspects:
                kept = [one for one in self._usable(found, family) if one.label == label]
                self.judges += kept[:1]
                lessons += [one.lesson for one in kept[1:] or kept]
        return lessons

    def _fresh(self, student: Classifier) -> list[Lesson]:
        """Triggers that still work on the repaired model and are smaller than natural ones."""
        lessons = []
        for family in self.settings.families:
            natural = self.natural.get(family)
            if natural is None:
                continue
            for one in self._usable(self._search(student, self.suspects, family), family):
                if one.size < natural:
                    lessons.append(one.lesson)
        return lessons

    def _usable(self, found: Recovered, family: FamilyName) -> list[_Kept]:
        return [
            _Kept(family, size, label, Lesson(trigger, self._exaggeration(family, size)))
            for label, trigger, size, flip in zip(
                found.classes, found.triggers, found.sizes, found.flips, strict=True
            )
            if flip >= self.settings.min_flip and not math.isnan(size)
        ]

    def _measure_natural(self) -> None:
        """Sizes that triggers need for classes without a backdoor."""
        assert self.evidence is not None
        inverted = self.evidence.inverted
        sizes = [
            size
            for label, size in zip(inverted.classes, inverted.sizes, strict=True)
            if label not in self.suspects and math.isfinite(size)
        ]
        if sizes:
            self.natural["patch"] = median(sizes)
        others = [k for k in range(self.model.num_classes) if k not in self.suspects][:INNOCENTS]
        if others and "additive" in self.settings.families:
            with self.clock("recover"):
                found = invert_jointly(
                    self.model,
                    (self.model,),
                    self.fitting,
                    others,
                    "additive",
                    replace(self.settings.joint, weight=0.0),
                    generator=self.generator,
                    progress=self.progress,
                )
            finite = [size for size in found.sizes if math.isfinite(size)]
            if finite:
                self.natural["additive"] = median(finite)

    def _exaggeration(self, family: FamilyName, size: float) -> float:
        """How many times as strong a trigger is as large as a natural one.

        A patch is as large as its mask is opaque; an added picture counts its squares.
        """
        natural = self.natural.get(family)
        if natural is None or not 0 < size < natural:
            return 1.0
        ratio = natural / size
        return min(ratio if family == "patch" else math.sqrt(ratio), self.settings.strongest)

    def _distil(self, start: Classifier, lessons: Sequence[Lesson], attempt: int) -> Classifier:
        phase = "distil" if attempt == 1 else f"distil {attempt}"
        with self.clock("distil"):
            student, self.phases[phase] = distil(
                self.model,
                start,
                lessons,
                self.fitting,
                self.settings.distilling,
                generator=self.generator,
                progress=self.progress,
                phase=phase,
            )
        return student

    def _moved(self, model: Classifier) -> float:
        """Largest share of the held-out images that a judging trigger at full strength moves."""
        return max(
            (flip_share(model, self.heldout, one.strong, one.label) for one in self.judges),
            default=0.0,
        )


def _until(progress: Progress, limit: float | None) -> Progress:
    """Reports progress until so many seconds have passed, then raises `TimeLimitError`."""
    if limit is None:
        return progress
    end = time.monotonic() + limit

    def told(phase: str, done: int, total: int, /, **figures: float) -> None:
        progress(phase, done, total, **figures)
        if time.monotonic() > end:
            raise TimeLimitError(f"the time limit of {limit:g} s has passed")

    return told
