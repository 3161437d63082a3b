"""`Run`: one model on its way through `Auto`."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import Deadline
from reprune.defense import Clock, Purified
from reprune.defenses.auto_repair import Repair
from reprune.defenses.distilling import Distilling
from reprune.defenses.trigger_bank import Bank
from reprune.defenses.trigger_recovery import recover_triggers
from reprune.detection import Evidence, Scanned
from reprune.detection.agreement import led_by_copies, supporting
from reprune.errors import RepruneError, TimeLimitError
from reprune.masks import ChannelMask
from reprune.results import Epoch, Finding, Sign, Trace
from reprune.types import Progress

if TYPE_CHECKING:
    from reprune.defenses.auto import Auto

SCANNED, RECOVERED = 0.5, 0.75
"""Shares of a time limit: after the first a suspicious model is not searched any further, after
the second no other kind of trigger is recovered."""


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
        self.repair: Repair | None = None
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
        self.repair = self.repairing()
        repaired = self.repair()
        self.bank, self.changed = self.repair.bank, repaired is not None
        return self.result(repaired, suffices=self.repair.sufficient(self.repair.left))

    def repairing(self) -> Repair:
        """Steps 3 to 5, to be called."""
        return Repair(
            settings=self.settings,
            distilling=self.distilling,
            model=self.model,
            original=self.original,
            fitting=self.fitting,
            heldout=self.heldout,
            bank=self.bank,
            suspects=self.suspects,
            evidence=self.evidence,
            generator=self.generator,
            report=self.report,
            deadline=self.deadline,
            clock=self.clock,
            notes=self.notes,
            phases=self.phases,
        )

    def suffices(self, model: Classifier) -> bool:
        """Whether the triggers put aside move nearly as little in this model as they have to."""
        return self.repair is not None and self.repair.sufficient(self.repair.moved(model))

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
        self.notes += evidence.told
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

    def result(self, repaired: Classifier | None, *, suffices: bool = True) -> Purified:
        evidence, scanned = self.evidence, self.scanned
        seen = scanned.trace if scanned else Trace()
        trace = replace(
            seen,
            phases={name: tuple(epochs) for name, epochs in self.phases.items()},
            notes=tuple(self.notes),
            repaired=self.judged_clean or (repaired is not None and suffices),
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


def accused(scanned: Scanned | None) -> bool:
    """Whether a scan called its model backdoored."""
    return scanned is not None and scanned.finding.verdict == "backdoored"
