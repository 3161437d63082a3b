"""`Auto`: look for a backdoor, and teach the model to ignore the triggers that were found."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import ClassVar, Literal

import torch

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Defense, Gain, Purified, check_holdout, hold_out
from reprune.defenses.distilling import Distilling, distil, interpolated
from reprune.defenses.trigger_bank import SEARCHES, Bank, TriggerSearch, recover_triggers
from reprune.detection import Evidence, Scan, Scanned
from reprune.detection.evidence import supporting
from reprune.errors import ConfigurationError, ConvergenceError, RepruneError, TimeLimitError
from reprune.evaluation import fitting_augmentation, flip_rate
from reprune.masks import ChannelMask
from reprune.results import Epoch, Finding, Sign, Trace
from reprune.rnp import Judge
from reprune.types import Progress

Effort = Literal["low", "normal", "high"]

SHARES = tuple(i / 8 for i in range(8, 0, -1))
"""Shares of the way from the original weights to the repaired ones, in the order they are tried."""

BETTER = 0.75
"""A higher rate must bring the share of moved images below this part of what a lower one left."""

COPIES = 5
"""Copies of the held-out images that guard, all but one augmented."""


@dataclass(frozen=True, kw_only=True)
class Auto(Defense):
    r"""Look for a backdoor; if there may be one, recover triggers and distil them out.

    1. *Scan* the model (`Scan`). A model judged clean comes back bit by bit.
    2. *Recover* triggers of several families for the suspected classes: patches, added pictures,
       sharp and smooth, and warps from the model alone, the waves of the scan, and added pictures
       and filters from the model together with its unlearned copies. Kept are those that work and
       are clearly smaller than natural ones, which innocent classes need, or any where the model is
       accused and none is. Where it is not accused, larger ones teach, too: those of searches in
       the model alone that name the class which its unlearned copies name, and where none does, so
       that the suspects are not sure, all. The copies serve for classes only that they favour. Of
       each kind of small ones one is put aside: it teaches nothing and judges.
    3. *Distil* (`distil`): a copy learns to answer triggered images as the original answers them
       without the trigger, in its last layers, in directions that clean images leave free. A
       trigger smaller than natural ones is exaggerated up to those, since an attacker's trigger
       works by far and the smallest one barely. The copy is judged on held-out images by the
       triggers put aside: where they still work, a copy is distilled anew at the next higher rate.
       Where they work after all rates, and the suspects are not sure, these may be wrong: then the
       scan's pictures for all other classes teach, too, as often as the triggers, which makes the
       copy harder to lead to any class (adversarial repair).
    4. *Step back* towards the original weights where the repair costs more than
       `max_accuracy_drop`, the paired drop on clean images that nothing was fitted to. If that is
       not enough, the model comes back unchanged.

    A phase that diverges, or the time limit, ends with the best model so far, and the notes say so.

    Source: this package. Unlearning from RNP (Li et al., ICML 2023), inversion after Neural
    Cleanse (Wang et al., S&P 2019), free directions after Wang et al., CVPR 2021, stepping back
    after Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    Attributes:
        scan: step 1.
        suspects: classes at most.
        search: step 2.
        distilling: step 3; of twice as many steps where the suspects are not sure.
        unsure: step 3 on pictures for all classes.
        rates: the learning rates of step 3, in order.
        left_over: the share of the held-out images that the triggers put aside may move, on
            average.
        holdout: share of the clean images that only guard and judge, in (0, 1).
        max_accuracy_drop: of the guard, in [0, 1].
        time_limit: seconds after which the method ends with what it has; `None` for none.
    """

    title: ClassVar[str] = "Scan, and distillation from the triggers of what was found"
    source_paper: ClassVar[str] = "this package"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger", "removal")

    scan: Scan = field(default_factory=Scan)
    suspects: int = 2
    search: TriggerSearch = field(default_factory=TriggerSearch)
    distilling: Distilling = field(default_factory=Distilling)
    unsure: Distilling = field(default_factory=lambda: Distilling(steps=256, weight=0.5))
    rates: tuple[float, ...] = (0.03, 0.1)
    left_over: float = 0.1
    holdout: float = 0.2
    max_accuracy_drop: float = 0.05
    time_limit: float | None = None

    @classmethod
    def effort(cls, level: Effort, time_limit: float | None = None) -> Auto:
        """The settings of an effort.

        "low" unlearns one copy, leaves out filters and distils once; "high" unlearns five,
        searches with twice as many images and recovers twice as many triggers.

        Raises:
            ConfigurationError: no such effort.
        """
        auto = cls(time_limit=time_limit)
        joint = auto.search.joint
        if level == "normal":
            return auto
        if level == "low":
            return replace(
                auto,
                scan=replace(auto.scan, exposures=1),
                search=replace(auto.search, searches=SEARCHES[:-1]),
                rates=auto.rates[:1],
            )
        if level == "high":
            return replace(
                auto,
                scan=replace(auto.scan, exposures=5),
                search=replace(
                    auto.search,
                    joint=replace(joint, images=2 * joint.images),
                    lessons=2 * auto.search.lessons,
                ),
            )
        raise ConfigurationError(f"effort must be low, normal or high, got {level!r}")

    def check(self) -> None:
        self.scan.check()
        self.search.check()
        self.distilling.check()
        self.unsure.check()
        check_holdout(self.holdout)
        if self.suspects < 1:
            raise ConfigurationError(f"suspects must be at least 1, got {self.suspects}")
        for name in ("left_over", "max_accuracy_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigurationError(f"rates must be positive, at least one, got {self.rates}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ConfigurationError(f"time_limit must be positive, got {self.time_limit}")

    def passes(self, images: int, classes: int) -> float:
        fitting = 1 - self.holdout
        count = round(fitting * images)
        found = fitting * self.search.passes(count, self.suspects)
        unsure = replace(self.distilling, steps=2 * self.distilling.steps)
        distilling = len(self.rates) * unsure.passes(count) + self.unsure.passes(count)
        repair = fitting * distilling
        kinds = len(self.search.searches) * self.suspects + 1  # waves lead to one class
        judged = self.holdout * (2 * (len(self.rates) + 1) * kinds + (kinds + len(SHARES)) * COPIES)
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
            reason = f"{late}, before there was a verdict"
            run.scanned = Scanned(Finding("undecided", (reason,)))
            run.notes.append(reason)
            return run.result(None)
        if not run.suspects:
            run.notes.append(
                "judged clean: the model is returned as it came"
                if run.judged_clean
                else "no class can be suspected: the model is returned as it came"
            )
            return run.result(None)
        repaired = run.repair()
        if repaired is not None:
            repaired = run.step_back(repaired)
        return run.result(repaired)


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
        self.bank = Bank((), ())

    @property
    def accused(self) -> bool:
        return self.scanned is not None and self.scanned.finding.verdict == "backdoored"

    @property
    def support(self) -> list[Sign]:
        """What makes the suspects of a model that is not accused credible."""
        return supporting(self.scanned.finding.signs) if self.scanned else []

    @property
    def sure(self) -> bool:
        """Whether the suspects are trusted; else there may be others."""
        return self.accused or bool(self.support)

    @property
    def judged_clean(self) -> bool:
        return self.scanned is not None and self.scanned.finding.verdict == "clean"

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

    def recover(self) -> None:
        """Step 2."""
        assert self.evidence is not None
        with self.clock("recover"):
            self.bank = recover_triggers(
                self.model,
                self.evidence,
                self.fitting,
                self.suspects,
                self._favoured(),
                self.settings.search,
                accused=self.accused,
                support=self.support,
                generator=self.generator,
                progress=self.progress,
            )

    def repair(self) -> Classifier | None:
        """Steps 2 and 3: the copy that the triggers put aside move least, `None` without any."""
        best: tuple[float, Classifier] | None = None
        try:
            self.recover()
            if not self.bank.lessons:
                self.notes.append(
                    "no trigger was recovered that works on the model and is smaller than natural "
                    "ones: it is returned unchanged"
                )
                return None
            before = self._moved(self.model)
            for rate in self.settings.rates:
                student = self._distil(rate)
                moved = self._moved(student)
                self.notes.append(
                    f"distilled on {len(self.bank.lessons)} triggers at a rate of {rate:g}: "
                    f"{len(self.bank.judges)} others move {moved:.0%} of the other held-out "
                    f"images, in the original {before:.0%}"
                )
                if best is None or moved < BETTER * best[0]:
                    best = moved, student
                if moved <= self.settings.left_over:
                    break
            else:
                if self.bank.others:
                    best = self._harden(before)
        except RepruneError as error:
            ending = "the model is returned unchanged" if best is None else "the repair ends"
            self.notes.append(f"{error}: {ending}")
        return None if best is None else best[1]

    def _harden(self, before: float) -> tuple[float, Classifier]:
        """Where the suspects' triggers cannot be distilled out: the suspects may be wrong."""
        student = self._distil(self.settings.rates[0], everywhere=True)
        moved = self._moved(student)
        self.notes.append(
            f"the suspects may be wrong: distilled on these and on {len(self.bank.others)} "
            f"pictures of all other classes; the triggers put aside move {moved:.0%}, in the "
            f"original {before:.0%}"
        )
        return moved, student

    def step_back(self, repaired: Classifier) -> Classifier | None:
        """Step 4; `None` where the repair costs too much."""
        limit = self.settings.max_accuracy_drop
        with self.clock("step back"):
            judge = Judge(
                self.model,
                self.heldout,
                budget=COPIES * len(self.heldout),
                augmentation=fitting_augmentation(self.model, self.fitting),
                generator=self.generator,
            )
            for share in SHARES:
                between = interpolated(self.model, repaired, share)
                drop = judge(between, threshold=0.0, channels=0).drop
                if drop <= limit:
                    moved = self._moved(between)
                    self.notes.append(
                        f"weights {share:.0%} of the way from the original to the distilled ones: "
                        f"{100 * drop:+.1f} points of accuracy lost on held-out images, "
                        f"{moved:.0%} of the other images moved by the triggers put aside"
                        + ("; what the guard allows, not what the triggers ask" * (share < 1))
                    )
                    return between
        self.notes.append(
            f"every share of the repair costs more than {100 * limit:.1f} points on held-out "
            "images: the model is returned unchanged"
        )
        return None

    def result(self, repaired: Classifier | None) -> Purified:
        evidence, scanned = self.evidence, self.scanned
        seen = scanned.trace if scanned else Trace()
        trace = replace(
            seen,
            phases={name: tuple(epochs) for name, epochs in self.phases.items()},
            notes=tuple(self.notes),
            repaired=repaired is not None or self.judged_clean,
            seconds=seen.seconds | self.clock.seconds,
        )
        shown = {
            k.label: k.lesson.trigger
            for k in reversed(self.bank.lessons)
            if isinstance(k.lesson.trigger, Stamp)
        }
        return Purified(
            repaired or self.model.clone().eval(),
            ChannelMask({}),
            trace,
            {"unlearned": evidence.exposed[0]} if evidence and evidence.exposed else {},
            shown,
            scanned,
        )

    def _favoured(self) -> list[int]:
        """Classes to which the unlearned copies have a backdoor, too, as it seems."""
        scan, evidence = self.settings.scan, self.evidence
        favourites = evidence.favourites.values() if evidence else ()
        return [f.label for f in favourites if f.strength >= scan.doubt]

    def _distil(self, rate: float, *, everywhere: bool = False) -> Classifier:
        phase = f"distil at {rate:g}" + " everywhere" * everywhere
        settings = self.settings.unsure if everywhere else self.settings.distilling
        if not self.sure and not everywhere:  # all kinds of triggers teach
            settings = replace(settings, steps=2 * settings.steps)
        with self.clock("distil"):
            student, self.phases[phase] = distil(
                self.model,
                self.bank.taught(everywhere=everywhere),
                self.fitting,
                replace(settings, lr=rate),
                generator=self.generator,
                progress=self.progress,
                phase=phase,
            )
        return student

    def _moved(self, model: Classifier) -> float:
        """Share of the other held-out images that the triggers put aside move, on average."""
        return fmean(
            flip_rate(model, self.heldout, one.strongest, one.label) for one in self.bank.judges
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
