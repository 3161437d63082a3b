"""`TriggerRepair`: recover the trigger of the suspected class, then train the model out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense, Gain, Purified
from reprune.defenses.erasing import check_loss_cap, erasing
from reprune.defenses.suspect import Course, Hunt, Suspect
from reprune.detection import Inversion
from reprune.errors import ConfigurationError
from reprune.evaluation import fitting_augmentation, flip_rate, predict
from reprune.masks import ChannelMask
from reprune.results import Trace
from reprune.rnp import RNP, FineTuning, Unlearning, check_unlearning, tune, unlearning_passes
from reprune.training import Batch, Objective
from reprune.types import Progress

COLLAPSE = 0.05
"""Accuracy lost on the defence data that is told of."""


@dataclass(frozen=True, kw_only=True)
class TriggerRepair(Defense):
    r"""Recover the trigger $t$ of the most anomalous class $k$ and repair the original model.

    With `by="finetune"`, clean images of which a share carries the trigger are learned with
    their true labels (Wang et al., S&P 2019, Section VI, "patching via unlearning"):

    $$\min_\theta E\, L(f(x'), y), \qquad x' = t(x) \text{ with probability } s, \text{ else } x$$

    With `by="unlearn"`, the answer $k$ to triggered images is forgotten while the clean ones are
    learned (Li et al., "Anti-Backdoor Learning", NeurIPS 2021, Section 3.3):

    $$\min_\theta E\, L(f(x), y) - E_{y \ne k} \min(L(f(t(x)), k), c \log K)$$

    With `unlearning`, the trigger is recovered on the model unlearned on the clean images, and
    the original is repaired (RNP, Appendices A.3 and D.1, Table 15). The class is then the one
    that the unlearned model falls back to, if it is clear, and the trigger is sought on the
    images that the unlearned model does not send there anyway. A trigger that fails on the
    original model is not used: the search starts again on the original, and a note says so.

    If no trigger is recovered, or no class stands out, or the trigger fails, the model comes back
    unchanged, `trace.repaired` is false and `trace.notes` says why.

    Choices where the papers are silent: which images carry the trigger is drawn anew for each
    batch; crops come before the trigger, so that it stays in its place; triggered images of the
    suspected class are not unlearned; SGD on a one-cycle schedule; the bound on the loss.

    Attributes:
        inversion: settings of the trigger recovery.
        by: "finetune" or "unlearn".
        tuning: of the repair, over all of the defence data.
        share: of the images of a batch that carry the trigger, in (0, 1].
        unlearning: recover the trigger on the unlearned model; `None` uses the original.
        index: anomaly index that the class must exceed, at least 0; not asked of the class that
            an unlearned model names.
        min_flip: share of the images of other classes that the trigger must send to its class in
            the original model, in (0, 1).
        loss_cap: c above, greater than 1; `None` for no bound. For "unlearn" only.
    """

    source_paper: ClassVar[str] = "Wang et al., S&P 2019; Li et al., NeurIPS 2021"
    gives: ClassVar[tuple[Gain, ...]] = ("trigger", "removal")

    inversion: Inversion = field(default_factory=Inversion)
    by: Literal["finetune", "unlearn"] = "finetune"
    tuning: FineTuning = field(default_factory=FineTuning)
    share: float = 0.2
    unlearning: Unlearning | None = None
    index: float = 0.0
    min_flip: float = 0.5
    loss_cap: float | None = 2.0

    @property
    def title(self) -> str:
        job = "Fine-tuning on" if self.by == "finetune" else "Unlearning of"
        return f"{job} a recovered trigger" + (", unlearned model" if self.unlearning else "")

    @classmethod
    def paper(
        cls, by: Literal["finetune", "unlearn"] = "finetune", *, unlearned: bool = False
    ) -> TriggerRepair:
        """The settings of the papers.

        Inversion as in `Inversion.paper` (many steps: for GPUs), classes of index above 2 (Wang et
        al., Sections IV and V). "finetune": a share of 0.2, and as many images as one epoch over
        10 % of CIFAR-10 has, which is 10 epochs of 500. "unlearn": 20 epochs at 5e-4 with weight
        decay 1e-4, loss unbounded (Li et al.). `unlearned` adds unlearning as in `RNP.paper`.
        Choices: learning rate 0.01 for "finetune"; the index is the one of `anomaly_indices`, on
        logarithms of sizes.
        """
        tuning = FineTuning(epochs=10)
        if by == "unlearn":
            tuning = FineTuning(lr=5e-4, epochs=20, weight_decay=1e-4)
        return cls(
            inversion=Inversion.paper(),
            by=by,
            tuning=tuning,
            unlearning=RNP.paper().unlearning if unlearned else None,
            index=2.0,
            loss_cap=None,
        )

    def check(self) -> None:
        if self.by not in ("finetune", "unlearn"):
            raise ConfigurationError(f"by must be 'finetune' or 'unlearn', got {self.by!r}")
        if not 0 < self.share <= 1:
            raise ConfigurationError(f"share must lie in (0, 1], got {self.share}")
        if not self.index >= 0:
            raise ConfigurationError(f"index must not be negative, got {self.index}")
        if not 0 < self.min_flip < 1:
            raise ConfigurationError(f"min_flip must lie in (0, 1), got {self.min_flip}")
        check_loss_cap(self.loss_cap)
        self.inversion.check()
        self.tuning.check()
        if self.unlearning is not None:
            check_unlearning(self.unlearning)

    def passes(self, images: int, classes: int) -> float:
        search = self.inversion.passes(images, classes) + classes
        extra = self.share + 1 / self.tuning.batch_size if self.by == "unlearn" else 0
        passes = 3 + search + self.tuning.epochs * (1 + 2 * extra) + 4
        if self.unlearning is not None:
            passes += unlearning_passes(self.unlearning, images) + search
        return passes

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        course = Course(model, clean, generator, progress)
        suspect = Hunt(self.inversion, self.unlearning, self.index, self.min_flip)(course)
        result = model.clone().eval()
        if suspect is None:
            course.notes.append("nothing was repaired: the model is returned unchanged")
        else:
            result = self._repair(course, suspect)
        trace = Trace(
            repaired=suspect is not None,
            phases=course.phases,
            label=course.label,
            notes=tuple(course.notes),
            seconds=course.clock.seconds,
        )
        triggers = {} if suspect is None else {suspect.label: suspect.trigger}
        mask = ChannelMask({})
        return Purified(result, mask, trace, course.stages, triggers)

    def _repair(self, course: Course, suspect: Suspect) -> Classifier:
        model, clean = course.model, course.clean
        objective: Callable[[Classifier], Objective]
        if self.by == "finetune":
            phase, objective = "fine-tune", _patching(suspect.trigger, self.share)
        else:
            phase = "erase"
            objective = erasing(_stamped(suspect, self.share), self.loss_cap)
        with course.clock(phase):
            result, course.phases[phase] = tune(
                model,
                clean,
                objective,
                self.tuning,
                phase=phase,
                augmentation=fitting_augmentation(model, clean),
                generator=course.generator,
                progress=course.progress,
            )
        after = flip_rate(result, clean, suspect.trigger, suspect.label)
        course.notes.append(
            f"the recovered trigger sends {suspect.flip:.1%} of the other images to class "
            f"{suspect.label} in the original model and {after:.1%} in the repaired one"
        )
        if after >= self.min_flip:
            course.notes.append("the repair failed: the recovered trigger still works")
        before, now = (
            float((predict(one, clean).argmax(1) == clean.labels).float().mean())
            for one in (model, result)
        )
        if now < before - COLLAPSE:
            course.notes.append(
                f"the repair cost accuracy: {before:.1%} of the defence data were right in the "
                f"original model, {now:.1%} are in the repaired one"
            )
        return result


def _drawn(batch: Batch, share: float) -> Tensor:
    """Positions in the batch that carry the trigger: `share` of them, at least one."""
    count = max(1, round(share * len(batch.images)))
    order = torch.randperm(len(batch.images), generator=batch.generator)
    return order[:count].to(batch.images.device)


def _patching(trigger: Stamp, share: float) -> Callable[[Classifier], Objective]:
    """Cross-entropy on the true labels, `share` of the images triggered."""

    def bind(model: Classifier) -> Objective:
        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            rows = _drawn(batch, share)
            images = batch.images.index_copy(0, rows, trigger(batch.images[rows]))
            logits = model(images).float()
            right = (logits.detach().argmax(1) == batch.labels).sum()
            return nn.functional.cross_entropy(logits, batch.labels), right

        return objective

    return bind


def _stamped(suspect: Suspect, share: float) -> Callable[[Batch], tuple[Tensor, Tensor, Tensor]]:
    """Triggered copies of a share of the batch, with the label that they shall lose."""

    def suspects(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        rows = _drawn(batch, share)
        labels = torch.full_like(batch.labels[rows], suspect.label)
        weights = (batch.labels[rows] != suspect.label).float()
        return suspect.trigger(batch.images[rows]), labels, weights

    return suspects
