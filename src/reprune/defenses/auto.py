"""`Auto`: look for a backdoor, and teach the model to ignore the triggers that were found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense, Gain, Purified, check_holdout, hold_out
from reprune.defenses.auto_repair import COPIES, SHARES
from reprune.defenses.auto_run import Run, accused
from reprune.defenses.distilling import Distilling
from reprune.defenses.trigger_bank import SEARCHES, TriggerSearch
from reprune.detection import Scan
from reprune.errors import ConfigurationError
from reprune.types import Progress, silent

Effort = Literal["low", "normal", "high"]

LATE = (
    "search",
    "distilling",
    "doubtful",
    "unsure",
    "rates",
    "left_over",
    "max_accuracy_drop",
    "rounds",
)
"""Settings of `Auto` that step 1 does not depend on."""

ACCUSED = 10
"""Classes at most that are repaired where as many are accused."""

LAST_HALF = Distilling(depth=0.5, ridge=0.1, mixed=0.0, repelled=0.0)
"""Lessons for the last half of the layers, that repel nothing."""


@dataclass(frozen=True, kw_only=True)
class Auto(Defense):
    r"""Look for a backdoor; if there may be one, recover triggers and distil them out.

    1. *Scan* the model (`Scan`). A model judged clean comes back bit by bit.
    2. *Recover* triggers of several families for the suspected classes: patches, added pictures,
       sharp and smooth, and warps from the model alone, the waves of the scan, and added pictures
       and filters from the model together with its unlearned copies. Kept are those that work and
       are clearly smaller than natural ones, which innocent classes need, or any where the model is
       accused and none is. Where it is not accused, larger ones teach, too: those of searches in
       the model alone that name the class which its unlearned copies or agreement name, and where
       none does, so that the suspects are not sure, all. The copies serve for classes only that
       they favour. Of each kind with more small ones than `search.lessons` one is put aside: it
       teaches nothing and judges. Where none has so many, those that teach judge, too.
    3. *Distil* (`distil`): a copy learns to answer triggered images as the original answers them
       without the trigger, in directions that clean images leave free, and to find the class that
       the trigger leads to the least likely one. A trigger smaller than natural ones is exaggerated
       up to those, since an attacker's trigger works by far and the smallest one barely. The copy
       is judged on held-out images by the triggers put aside: where they still work, a copy is
       distilled anew at the next higher rate. Where they work after all rates, and the suspects are
       not sure, these may be wrong: then the scan's pictures for all other classes teach, too, as
       often as the triggers, which makes the copy harder to lead to any class (adversarial repair).
       Where they no longer work, filters, of which hardly any teaches, and added pictures, sharp
       and smooth, are sought in the copy itself: where some lead to a suspect more easily than is
       natural (`overlooked`), a copy is distilled anew with these, too.
    4. *Recalibrate*: the copy's batch norms give clean images the mean and variance that those of
       the original give them (`recalibrated`), where that lowers the Brier score on the held-out
       images, which sees more than their accuracy, and the triggers put aside move no more of these
       than before, or no more than the original leads to a wrong class by mistake, on average.
    5. *Step back* towards the original weights where the repair costs more than
       `max_accuracy_drop`, the paired drop on clean images that nothing was fitted to. If that is
       not enough, the model comes back unchanged.

    With more than one of `rounds`, a model that was accused and repaired is scanned again, for
    there may be a second backdoor that the first one hid. Where it still is accused, steps 2 to 5
    repair the repaired model, guarded against the original one.

    A phase that diverges, or the time limit, ends with the best model so far, and the notes say so.
    With a limit a suspicious model is searched no further after half of it, and after
    three quarters no other kind of triggers is recovered, so that there is time to teach.

    Source: this package. Unlearning from RNP (Li et al., ICML 2023), inversion after Neural
    Cleanse (Wang et al., S&P 2019), free directions after Wang et al., CVPR 2021, stepping back
    after Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    Attributes:
        scan: step 1.
        suspects: classes at most; but where more are accused, up to ten of these.
        search: step 2.
        distilling: step 3; of twice as many steps where the suspects are not sure and the doubt is
            not that of the unlearned copies.
        doubtful: step 3 where the unlearned copies make the model doubtful, so that what was
            recovered is unlike the attacker's trigger; as `distilling` where it is `None`.
        unsure: step 3 on pictures for all classes.
        rates: the learning rates of step 3, in order.
        left_over: the share of the held-out images that the triggers put aside may move, on
            average.
        holdout: share of the clean images that only guard and judge, in (0, 1).
        max_accuracy_drop: of the guard, in [0, 1].
        rounds: scans and repairs at most.
        time_limit: seconds after which the method ends with what it has; `None` for none. What
            lies between `begin` and `finish` does not count.
    """

    title: ClassVar[str] = "Scan, and distillation from the triggers of what was found"
    source_paper: ClassVar[str] = "this package"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger", "removal")

    scan: Scan = field(default_factory=Scan)
    suspects: int = 2
    search: TriggerSearch = field(default_factory=TriggerSearch)
    distilling: Distilling = field(default_factory=Distilling)
    doubtful: Distilling | None = None
    unsure: Distilling = field(default_factory=lambda: replace(LAST_HALF, steps=256, weight=0.5))
    rates: tuple[float, ...] = (0.03, 0.1)
    left_over: float = 0.1
    holdout: float = 0.2
    max_accuracy_drop: float = 0.05
    rounds: int = 1
    time_limit: float | None = None

    @classmethod
    def effort(cls, level: Effort) -> Auto:
        """The settings of an effort.

        "low" seeks no filters in model and copies and nothing in what it taught, and distils once;
        "high" searches with twice as many images, recovers twice as many triggers, and looks at the
        repaired model again. Where a model is unlearned, "low" makes one copy and "high" five.

        Raises:
            ConfigurationError: no such effort.
        """
        auto = cls()
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
                rounds=2,
            )
        raise ConfigurationError(f"effort must be low, normal or high, got {level!r}")

    @classmethod
    def late(cls) -> Auto:
        """What the default was before triggered images were repelled from their class.

        The last half of the layers learns; where the unlearned copies make the model doubtful all
        of them, on mixtures of images, too.
        """
        return cls(distilling=LAST_HALF, doubtful=replace(LAST_HALF, depth=1.0, mixed=3.0))

    @property
    def skipped(self) -> tuple[str, ...]:
        most = Auto.effort("high")
        copies, lessons = most.scan.exposures, most.search.lessons
        made = self.scan.exposures if self.scan.unlearning else 0
        seen, images = self.search.joint.images, most.search.joint.images
        kinds = [str(s) for s in most.search.searches if s not in self.search.searches]
        left_out = {
            f"{copies - made} of {copies} unlearned copies (of models that no search accuses)": (
                made < copies
            ),
            f"{lessons - self.search.lessons} of {lessons} triggers of each kind": (
                self.search.lessons < lessons
            ),
            f"{images - seen} of {images} images of each search": seen < images,
            f"searches for triggers: {', '.join(kinds)}": bool(kinds),
            "triggers in what was taught": not self.search.looks,
            "teaching once more at a higher rate": len(self.rates) < len(most.rates),
            "another scan of the repaired model": self.rounds < most.rounds,
        }
        said = ", ".join(words for words, missing in left_out.items() if missing)
        return (f"left out at this effort: {said}",) if said else ()

    @property
    def thorough(self) -> Distilling:
        """Step 3 where the suspects are not sure and the unlearned copies do not lead."""
        return replace(self.distilling, steps=2 * self.distilling.steps)

    @property
    def doubting(self) -> Distilling:
        """Step 3 where the unlearned copies make the model doubtful."""
        return self.doubtful or self.distilling

    def most_suspects(self, accused: int) -> int:
        """How many classes at most are suspected, where so many are accused."""
        return max(self.suspects, min(accused, ACCUSED))

    def check(self) -> None:
        self.scan.check()
        self.search.check()
        self.distilling.check()
        if self.doubtful is not None:
            self.doubtful.check()
        self.unsure.check()
        check_holdout(self.holdout)
        for name in ("suspects", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
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
        suspects = self.most_suspects(classes // 2)
        found = fitting * self.search.passes(count, suspects)
        longest = max(self.thorough.passes(count), self.doubting.passes(count))
        last = max(longest, self.unsure.passes(count))  # once more, or everywhere
        repair = fitting * (len(self.rates) * longest + last)
        searches = len(self.search.searches) + len(self.search.looks)
        kinds = searches * suspects + 1  # waves lead to one class
        judged = self.holdout * (
            2 * (len(self.rates) + 2) * kinds + (kinds + len(SHARES) + 2) * COPIES
        )
        calibrated = 2 * fitting
        once = self.scan.passes(images, classes) + found + repair + calibrated + judged
        return self.rounds * once + 2

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        return self._finished(self._begun(model, clean, generator, progress))

    def begin(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Run:
        """Steps 1 and 2, for several settings of what follows the scan: see `finish`.

        Arguments and errors are those of a call.
        """
        clean = self.checked(model, clean)
        with model.evaluating():
            return self._begun(model, clean, generator.clone_state(), progress)

    def _begun(
        self, model: Classifier, clean: ImageSet, generator: torch.Generator, progress: Progress
    ) -> Run:
        heldout, fitting = hold_out(clean, self.holdout, generator)
        run = Run(self, model, clean, fitting, heldout, generator, progress)
        run.begin()
        return run

    def finish(self, begun: Run) -> Purified:
        """Bit by bit what a call returns, from what `begin` of this method returned.

        Or of one that differs from this one in `LATE` only; triggers are recovered anew where it
        searched for others. `begun` is not changed.
        """
        self.check()
        with begun.model.evaluating():
            return self._finished(begun.again(self))

    def _finished(self, run: Run) -> Purified:
        result = run.finish()
        for count in range(2, self.rounds + 1):
            if not (run.changed and accused(result.scanned)):
                break
            again = run.following(result.model)
            again.begin(only_accused=True)
            second = again.finish()
            still = run.suffices(second.model)
            result = _followed(result, second, f"round {count}", still=still)
            if not accused(second.scanned):
                break
            run = again
        return result


def _followed(first: Purified, second: Purified, name: str, *, still: bool) -> Purified:
    """A result after a second round on its model; the verdict is that on the original model.

    `still` is whether the second model suffices by what judged the first one.
    """
    seconds = dict(first.trace.seconds)
    for phase, spent in second.trace.seconds.items():
        seconds[phase] = seconds.get(phase, 0.0) + spent
    phases = {f"{name}, {phase}": epochs for phase, epochs in second.trace.phases.items()}
    why = second.scanned.finding.reasons[:1] if second.scanned else ()
    said = [f"{name}: {note}" for note in (*why, *second.trace.notes)]
    trace = replace(
        first.trace,
        phases=dict(first.trace.phases) | phases,
        notes=(*first.trace.notes, *said),
        repaired=still and (second.trace.repaired or not accused(second.scanned)),
        seconds=seconds,
    )
    return replace(
        first,
        model=second.model,
        trace=trace,
        triggers=dict(second.triggers) | dict(first.triggers),
    )
