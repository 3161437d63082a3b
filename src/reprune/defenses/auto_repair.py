"""`Repair`: teach a model to ignore the triggers that were recovered, and judge what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import NO_END, Deadline
from reprune.defense import Clock
from reprune.defenses.distilling import Distilling, distil, interpolated
from reprune.defenses.trigger_bank import Bank
from reprune.defenses.trigger_recovery import overlooked
from reprune.detection import Evidence
from reprune.errors import RepruneError
from reprune.evaluation import fitting_augmentation, predict
from reprune.metrics import brier_score
from reprune.recalibration import batch_norms, recalibrated
from reprune.results import Epoch
from reprune.rnp import Judge
from reprune.types import Progress, silent

if TYPE_CHECKING:
    from reprune.defenses.auto import Auto

SHARES = tuple(i / 8 for i in range(8, 0, -1))
"""Shares of the way from the original weights to the repaired ones, in the order they are tried."""

BETTER = 0.75
"""A higher rate must bring the share of moved images below this part of what a lower one left.

Of a copy that all classes taught, the one before must not leave less than this part.
"""

COPIES = 5
"""Copies of the held-out images that guard, all but one augmented."""

Copy = tuple[float, Classifier]
"""A repaired copy, after the share of the other held-out images that triggers put aside move."""


@dataclass(kw_only=True)
class Repair:
    """Steps 3 to 5 of `Auto`.

    Attributes:
        settings: those of the method.
        distilling: the settings of step 3 for the verdict on the model.
        model: what is repaired; it is not changed.
        original: what the guard compares with.
        fitting, heldout: clean images that teach, and that judge.
        bank: what teaches and judges; it grows by what a copy shows.
        suspects, evidence: of the scan, to look at a copy.
        report: hears of the progress.
        clock, notes, phases: what is spent, decided and taught.
        left: share of the other held-out images that the triggers put aside move in the result.
    """

    settings: Auto
    distilling: Distilling
    model: Classifier
    original: Classifier
    fitting: ImageSet
    heldout: ImageSet
    bank: Bank
    generator: torch.Generator
    suspects: Sequence[int] = ()
    evidence: Evidence | None = None
    report: Progress = silent
    deadline: Deadline = NO_END
    clock: Clock = field(default_factory=Clock)
    notes: list[str] = field(default_factory=list)
    phases: dict[str, Sequence[Epoch]] = field(default_factory=dict)
    left: float = 0.0

    def __call__(self) -> Classifier | None:
        """The repaired model; `None` where lessons diverge or the repair costs too much."""
        taught = self.teach()
        if taught is None:
            return None
        guard = self.guard()
        return self.step_back(self.recalibrate(taught, guard), guard)

    def sufficient(self, moved: float) -> bool:
        """Whether triggers put aside that move so much move nearly as little as they have to."""
        return BETTER * moved <= self.settings.left_over

    def teach(self) -> Classifier | None:
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
                    best = self._harden(best, before)
        except RepruneError as error:
            ending = "the model is returned unchanged" if best is None else "the repair ends"
            self.notes.append(f"{error}: {ending}")
        return None if best is None else best[1]

    def _look_once_more(self, moved: float, repaired: Classifier, rate: float) -> Copy:
        """Triggers of the copy itself may be what the triggers put aside do not know of."""
        assert self.evidence is not None
        taught = {one.label for one in self.bank.lessons}
        search = self.settings.search  # as the scan searched, for sizes are compared with its own
        search = replace(search, joint=self.settings.scan.joint or search.joint)
        with self.clock("look at the copy"):
            found = overlooked(
                repaired,
                self.evidence,
                self.fitting,
                self.suspects,
                search,
                repelled=taught if self.distilling.repelled else (),
                generator=self.generator.clone_state(),
                progress=self.deadline.watching(self.report),
            )
        if not found:
            return moved, repaired
        for more in found.values():
            self.bank = self.bank.extended(more)
        kinds = ", ".join(
            f"{len(more.lessons)} {family} from {min(one.size for one in more.lessons):.1f} "
            "squared pixels to class "
            + " or ".join(str(k) for k in sorted({one.label for one in more.lessons}))
            for family, more in found.items()
        )
        self.notes.append(f"small triggers still lead the copy, and teach, too: {kinds}")
        moved, student = self.moved(repaired), self._distil(rate, again=True)
        left = self.moved(student)
        self.notes.append(
            f"distilled once more: what judges, some of them among it, moves {left:.0%}, in the "
            f"copy before {moved:.0%}"
        )
        return (left, student) if left < BETTER * moved else (moved, repaired)

    def _harden(self, best: Copy | None, before: float) -> Copy:
        """Where the suspects' triggers cannot be distilled out: the suspects may be wrong.

        So the triggers put aside say less of this copy: it is taken unless it is clearly worse by
        them, or was not taught to the end.
        """
        student = self._distil(self.settings.rates[0], everywhere=True)
        ended = self.deadline.passed
        moved = self.moved(student)
        self.notes.append(
            f"the suspects may be wrong: distilled on these and on {len(self.bank.others)} "
            f"pictures of all other classes; the triggers put aside move {moved:.0%}, in the "
            f"original {before:.0%}"
        )
        if best is None or (not ended and BETTER * moved <= best[0]):
            return moved, student
        why = "its lessons were not taught to the end" if ended else "that is clearly worse"
        self.notes.append(f"{why}: the copy before it is kept, in which they move {best[0]:.0%}")
        return best

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
        """Step 4, where clean images are answered better and the triggers put aside do not wake."""
        if not batch_norms(repaired):
            return repaired
        with self.clock("recalibrate"):
            copy = recalibrated(repaired, self.model, self.fitting)
            errors = self.erred(repaired, guard), self.erred(copy, guard)
            moves = self.moved(repaired), self.moved(copy)
        natural = guard.mistaken / (self.model.num_classes - 1)
        taken = errors[1] < errors[0] and moves[1] <= max(moves[0], natural)
        self.notes.append(
            f"batch norms that give clean images what the original's do: Brier score "
            f"{errors[1]:.3f} on held-out images instead of {errors[0]:.3f}, and {moves[1]:.1%} of "
            f"the others move instead of {moves[0]:.1%} (the original leads {natural:.1%} to a "
            "wrong class on average): "
            f"they are {'taken' if taken else 'not taken'}"
        )
        return copy if taken else repaired

    def erred(self, model: Classifier, guard: Judge) -> float:
        """The Brier score on the held-out images."""
        return brier_score(predict(model, guard.data), guard.data.labels)

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
                        + ("; that does not suffice" * (not self.sufficient(self.left)))
                    )
                    return between
        self.notes.append(
            f"every share of the repair costs more than {100 * limit:.1f} points on held-out "
            "images: the model is returned unchanged"
        )
        return None

    def _distil(self, rate: float, *, everywhere: bool = False, again: bool = False) -> Classifier:
        phase = f"distil at {rate:g}" + " everywhere" * everywhere + " once more" * again
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
        return self.bank.moved(model, self.heldout)
