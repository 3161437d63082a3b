"""`Run`: one model on its way through `Auto`."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import Deadline
from reprune.defense import Clock, Purified
from reprune.defenses.distilling import Distilling, distil, interpolated
from reprune.defenses.trigger_bank import Bank, overlooked, recover_triggers
from reprune.detection import Evidence, Scanned
from reprune.detection.agreement import led_by_copies, supporting
from reprune.errors import RepruneError, TimeLimitError
from reprune.evaluation import fitting_augmentation, flip_rate
from reprune.masks import ChannelMask
from reprune.recalibration import batch_norms, recalibrated
from reprune.results import Epoch, Finding, Sign, Trace
from reprune.rnp import Judge
from reprune.types import Progress

if TYPE_CHECKING:
    from reprune.defenses.auto import Auto

SHARES = tuple(i / 8 for i in range(8, 0, -1))
"""Shares of the way from the original weights to the repaired ones, in the order they are tried."""

BETTER = 0.75
"""A higher rate must bring the share of moved images below this part of what a lower one left."""

COPIES = 5
"""Copies of the held-out images that guard, all but one augmented."""


SCANNED, RECOVERED = 0.5, 0.75
"""Shares of a time limit: after the first a suspicious model is not searched any further, after
the second no other kind of trigger is recovered."""


Copy = tuple[float, Classifier]
"""A repaired copy, after the share of the other held-out images that triggers put aside move."""


class Run:
    """One model on its way; `original` is what it came from, if it was repaired before.

    `over` says after `begin` why nothing follows, where that is so; `changed` after `finish`
    whether the result has other weights.
    """

    def __init__(
        self,
        settings: Auto,
        model: Classifier,
        clean: ImageSet,
        fitting: ImageSet,
        heldout: ImageSet,
        generator: torch.Generator,
        progress: Progress,
        original: Classifier | None = None,
    ) -> None:
        self.settings, self.model, self.original = settings, model, original or model
        self.clean, self.fitting, self.heldout = clean, fitting, heldout
        self.generator, self.report = generator, progress
        self.started, self.spent = time.monotonic(), 0.0
        self._end_by(Deadline(settings.time_limit))
        self.clock = Clock()
        self.notes: list[str] = []
        self.phases: dict[str, Sequence[Epoch]] = {}
        self.suspects: list[int] = []
        self.evidence: Evidence | None = None
        self.scanned: Scanned | None = None
        self.bank = Bank((), ())
        self.left = 0.0
        """Share of the other held-out images that the triggers put aside move in the result."""
        self.changed = False
        self.over = ""
        self.looked: Run | None = None
        """This run as it was after step 1, if there is more to begin with."""

    def begin(self, *, only_accused: bool = False) -> None:
        """Steps 1 and 2; with `only_accused`, nothing is recovered on a doubt.

        Sets `over` where nothing is to follow.
        """
        self._begin(only_accused)
        self.spent = time.monotonic() - self.started

    def _begin(self, only_accused: bool) -> None:
        try:
            self.look()
        except TimeLimitError as late:
            self.over = f"{late}, before there was a verdict"
            self.scanned = Scanned(Finding("undecided", (self.over,)))
            return
        self.looked = self._copied()
        self.looked.spent = time.monotonic() - self.started
        self._gather_triggers(only_accused)

    def _end_by(self, deadline: Deadline) -> None:
        self.deadline, self.progress = deadline, deadline.watching(self.report)

    def _gather_triggers(self, only_accused: bool) -> None:
        why = ""
        if only_accused and not self.accused:
            why = "not accused"
        elif not self.suspects:
            why = "judged clean" if self.judged_clean else "no class can be suspected"
        if why:
            self.over = f"{why}: the model is returned as it came"
            return
        try:
            self.recover()
        except RepruneError as error:
            self.over = f"{error}: the model is returned unchanged"
            return
        if not self.bank.lessons:
            self.over = (
                "no trigger was recovered that works on the model and is smaller than natural "
                "ones: it is returned unchanged"
            )

    def again(self, settings: Auto) -> Run:
        """A run that has begun like this one and goes on by other settings of steps 2 to 5."""
        start = (
            self if self.looked is None or settings.search == self.settings.search else self.looked
        )
        other = start._copied()
        other.settings = settings
        other._end_by(Deadline(settings.time_limit, spent=other.spent))
        if start is not self:
            other._gather_triggers(only_accused=False)
        return other

    def _copied(self) -> Run:
        """A run that goes on from here and leaves this one as it is."""
        other = copy.copy(self)
        other.generator = self.generator.clone_state()
        other.clock = copy.deepcopy(self.clock)
        other.notes, other.phases = list(self.notes), dict(self.phases)
        return other

    def following(self, model: Classifier) -> Run:
        """A run on a model that this one repaired."""
        images = self.clean, self.fitting, self.heldout
        other = Run(
            self.settings, model, *images, self.generator, self.report, original=self.original
        )
        other._end_by(self.deadline)
        return other

    def finish(self) -> Purified:
        """Steps 3 to 5."""
        if self.over:
            self.notes.append(self.over)
            return self.result(None)
        repaired = self.repair()
        between = None
        if repaired is not None:
            guard = self.guard()
            between = self.step_back(self.recalibrate(repaired, guard), guard)
        self.changed = between is not None
        return self.result(between)

    @property
    def accused(self) -> bool:
        return accused(self.scanned)

    @property
    def support(self) -> list[Sign]:
        """What makes the suspects of a model that is not accused credible."""
        return supporting(self.scanned.finding.signs) if self.scanned else []

    @property
    def sure(self) -> bool:
        """Whether the suspects are trusted; else there may be others."""
        return self.accused or bool(self.support)

    @property
    def distilling(self) -> Distilling:
        """The settings of step 3 for such a verdict."""
        settings = self.settings
        if self.scanned is not None and led_by_copies(self.scanned.finding.signs):
            return settings.doubting
        return settings.distilling if self.sure else settings.thorough

    @property
    def sufficient(self) -> bool:
        """Whether the triggers put aside move as little as they have to, or nearly."""
        return BETTER * self.left <= self.settings.left_over

    @property
    def judged_clean(self) -> bool:
        return self.scanned is not None and self.scanned.finding.verdict == "clean"

    def look(self) -> None:
        """Step 1: evidence, verdict and suspects.

        Raises:
            TimeLimitError: no time is left.
        """
        scan = self.settings.scan
        evidence = scan.gather(
            self.model,
            self.clean,
            generator=self.generator,
            progress=self.progress,
            patience=self.deadline.part(SCANNED),
        )
        self.notes += evidence.notes
        self.evidence, self.scanned = evidence, scan.judge(evidence)
        self.phases |= evidence.phases
        accused = len(self.scanned.finding.targets)
        most = self.settings.most_suspects(accused)
        self.suspects = scan.suspects(evidence)[:most]
        if accused > most:
            self.notes.append(f"{accused} classes are accused: the first {most} are repaired")

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
                patience=self.deadline.part(RECOVERED),
            )
        if self.bank.hurried:
            self.notes.append("there was no time for all kinds of triggers")

    def repair(self) -> Classifier | None:
        """Step 3: the best copy by what the triggers put aside move, `None` where it diverges."""
        best: Copy | None = None
        try:
            before = self.moved(self.model)
            for rate in self.settings.rates:
                student = self._distil(rate)
                moved = self.moved(student)
                self.notes.append(
                    f"distilled on {len(self.bank.lessons)} triggers at a rate of {rate:g}: "
                    f"{len(self.bank.judges)} others move {moved:.0%} of the other held-out "
                    f"images, in the original {before:.0%}"
                )
                if best is None or moved < BETTER * best[0]:
                    best = moved, student
                if moved <= self.settings.left_over:
                    best = self._look_once_more(*best, rate)
                    break
            else:
                if self.bank.others:
                    best = self._harden(before)
        except RepruneError as error:
            ending = "the model is returned unchanged" if best is None else "the repair ends"
            self.notes.append(f"{error}: {ending}")
        return None if best is None else best[1]

    def _look_once_more(self, moved: float, repaired: Classifier, rate: float) -> Copy:
        """Filters may find what the triggers put aside, which are like the lessons, do not."""
        assert self.evidence is not None
        with self.clock("look at the copy"):
            more = overlooked(
                repaired,
                self.evidence,
                self.fitting,
                self.suspects,
                self.settings.search,
                generator=self.generator.clone_state(),
                progress=self.progress,
            )
        if not more.lessons:
            return moved, repaired
        self.bank = self.bank.extended(more)
        moved, student = self.moved(repaired), self._distil(rate, filters=True)
        left = self.moved(student)
        first = min(more.lessons, key=lambda one: one.size)
        self.notes.append(
            f"a filter of {first.size:.1f} squared pixels still leads the copy to class "
            f"{first.label}: distilled on {len(more.lessons)} filters, too; what is put aside, "
            f"filters among it, moves {left:.0%}, in the copy before {moved:.0%}"
        )
        return (left, student) if left < BETTER * moved else (moved, repaired)

    def _harden(self, before: float) -> Copy:
        """Where the suspects' triggers cannot be distilled out: the suspects may be wrong."""
        student = self._distil(self.settings.rates[0], everywhere=True)
        moved = self.moved(student)
        self.notes.append(
            f"the suspects may be wrong: distilled on these and on {len(self.bank.others)} "
            f"pictures of all other classes; the triggers put aside move {moved:.0%}, in the "
            f"original {before:.0%}"
        )
        return moved, student

    def guard(self) -> Judge:
        """Compares models with the original on the held-out images."""
        return Judge(
            self.original,
            self.heldout,
            budget=COPIES * len(self.heldout),
            augmentation=fitting_augmentation(self.model, self.fitting),
            generator=self.generator,
        )

    def recalibrate(self, repaired: Classifier, guard: Judge) -> Classifier:
        """Step 4, where it saves accuracy."""
        if not batch_norms(repaired):
            return repaired
        with self.clock("recalibrate"):
            copy = recalibrated(repaired, self.model, self.fitting)
            drops = self.dropped(repaired, guard), self.dropped(copy, guard)
            moves = self.moved(repaired), self.moved(copy)
        taken = drops[1] < drops[0] and moves[1] <= moves[0]
        self.notes.append(
            "batch norms that give clean images what the original's do lose "
            f"{100 * drops[1]:+.1f} points of accuracy on held-out images instead of "
            f"{100 * drops[0]:+.1f}, and {moves[1]:.0%} of the others move instead of "
            f"{moves[0]:.0%}: they are {'taken' if taken else 'not taken'}"
        )
        return copy if taken else repaired

    def dropped(self, model: Classifier, guard: Judge) -> float:
        """The paired accuracy drop on the held-out images."""
        return guard(model, threshold=0.0, channels=0).drop

    def step_back(self, repaired: Classifier, guard: Judge) -> Classifier | None:
        """Step 5; `None` where the repair costs too much."""
        limit = self.settings.max_accuracy_drop
        with self.clock("step back"):
            for share in SHARES:
                between = interpolated(self.model, repaired, share)
                drop = self.dropped(between, guard)
                if drop <= limit:
                    self.left = self.moved(between)
                    self.notes.append(
                        f"weights {share:.0%} of the way from the original to the distilled ones: "
                        f"{100 * drop:+.1f} points of accuracy lost on held-out images, "
                        f"{self.left:.0%} of the other images moved by the triggers put aside"
                        + ("; what the guard allows, not what the triggers ask" * (share < 1))
                        + ("; that does not suffice" * (not self.sufficient))
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
            repaired=self.judged_clean or (repaired is not None and self.sufficient),
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

    def _distil(
        self, rate: float, *, everywhere: bool = False, filters: bool = False
    ) -> Classifier:
        phase = f"distil at {rate:g}" + " everywhere" * everywhere + " with filters" * filters
        settings = self.settings.unsure if everywhere else self.distilling
        self.deadline.check()
        with self.clock("distil"):
            student, self.phases[phase] = distil(
                self.model,
                self.bank.taught(everywhere=everywhere),
                self.fitting,
                replace(settings, lr=rate),
                generator=self.generator,
                progress=self.report,
                phase=phase,
                deadline=self.deadline,
            )
        if self.deadline.passed:
            self.notes.append("the time limit ended the lessons: the copy is judged as it is")
        return student

    def moved(self, model: Classifier) -> float:
        """Share of the other held-out images that the triggers put aside move, on average."""
        return fmean(
            flip_rate(model, self.heldout, one.strongest, one.label) for one in self.bank.judges
        )


def accused(scanned: Scanned | None) -> bool:
    """Whether a scan called its model backdoored."""
    return scanned is not None and scanned.finding.verdict == "backdoored"
