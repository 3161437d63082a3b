"""`JointRepair`: recover triggers jointly, teach the model to answer as if they were not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Defense, Gain, Purified, check_holdout, hold_out
from reprune.detection.families import FAMILIES, FamilyName
from reprune.detection.joint import Joint, Recovered, invert_jointly, joint_indices
from reprune.detection.unlearned_label import unlearned
from reprune.errors import ConfigurationError, ConvergenceError
from reprune.evaluation import fitting_augmentation
from reprune.masks import ChannelMask
from reprune.results import BackdoorLabel, Epoch, Trace
from reprune.rnp import Judge, Unlearning, check_unlearning
from reprune.rnp.unlearn import unlearning_passes
from reprune.training import Batch, Objective, fit, one_cycle
from reprune.types import Progress, Trigger

STEPS_BACK = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way from the original weights to the repaired ones that are tried."""

PARTS = 4
"""Triggers of the bank in one batch."""

PLATEAU = 0.7
"""A share of the way suffices if a fresh trigger for its model is this large beside that for the
whole way."""


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """Settings of the repair.

    Attributes:
        steps: of the optimiser, at least; whole passes over the fitted images.
        lr: peak rate of Adam, on a one-cycle schedule.
        batch_size: clean images a step; each comes once more mixed, and once triggered.
        temperature: of the softmax that is compared.
        weight: of the triggered images beside the clean ones.
    """

    steps: int = 150
    lr: float = 5e-4
    batch_size: int = 64
    temperature: float = 2.0
    weight: float = 1.0

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("steps", "lr", "batch_size", "temperature", "weight"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)}")

    def epochs(self, images: int) -> int:
        """Passes over so many images."""
        return math.ceil(self.steps / math.ceil(images / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class JointRepair(Defense):
    r"""Recover triggers that need the backdoor, and distil the model out of them.

    1. *Expose*: unlearn a copy on the clean images ($\hat f$).
    2. *Suspect*: for every class the smallest added picture that leads there in the model and in
       the copy (`invert_jointly`); classes whose picture is far smaller than the others' are
       suspects. Without any the model comes back as it was.
    3. *Bank*: joint triggers of several families for the suspects; those that work on the model.
    4. *Distil*: a copy learns to answer triggered images as the original answers them clean,
       and clean and mixed ones as the original does,

       $$\min_\theta D(f(x) \| f_\theta(x)) + D(f(x_m) \| f_\theta(x_m))
         + w D(f(x) \| f_\theta(t(x)))$$

    5. *Judge*: fresh triggers are sought for the repaired model. Where they are hardly larger than
       the first, they join the bank and the repair starts over.
    6. *Step back* towards the original weights as far as fresh triggers stay as large.

    Labels serve the unlearning and the guard only. The guard is the paired accuracy drop on
    images that nothing was fitted to: a repair that exceeds it is given up.

    Source: this package; unlearning from RNP (Li et al., ICML 2023), inversion after Neural Cleanse
    (Wang et al., S&P 2019), stepping back after Wortsman et al., "Robust fine-tuning of zero-shot
    models", CVPR 2022.

    Attributes:
        unlearning: step 1, on all clean images.
        exposures: unlearned copies, each with its own random order.
        joint: the inversions.
        families: of the bank.
        index: anomaly index from which a class is suspected.
        suspects: how many at most.
        min_flip: share of the images that a trigger of the bank must send to its class.
        growth: the repair is done once fresh triggers are this many times as large as the first.
        rounds: how often the repair is done at most.
        distilling: step 4.
        holdout: share of the clean images that only the guard sees.
        max_accuracy_drop: of the guard, in [0, 1].
    """

    title: ClassVar[str] = "Distillation out of jointly recovered triggers"
    source_paper: ClassVar[str] = "this package"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger", "removal")

    unlearning: Unlearning = field(default_factory=Unlearning)
    exposures: int = 2
    joint: Joint = field(default_factory=Joint)
    families: tuple[FamilyName, ...] = ("patch", "additive", "filter")
    index: float = 2.0
    suspects: int = 3
    min_flip: float = 0.5
    growth: float = 2.5
    rounds: int = 2
    distilling: Distilling = field(default_factory=Distilling)
    holdout: float = 0.2
    max_accuracy_drop: float = 0.04

    def check(self) -> None:
        check_unlearning(self.unlearning)
        self.joint.check()
        self.distilling.check()
        check_holdout(self.holdout)
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise ConfigurationError(
                f"families must be some of {', '.join(FAMILIES)}, got {self.families}"
            )
        for name in ("exposures", "suspects", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.index > 0:
            raise ConfigurationError(f"index must be positive, got {self.index}")
        if not (self.growth >= 1 and 0 <= self.max_accuracy_drop <= 1):
            raise ConfigurationError(
                "growth must be at least 1 and max_accuracy_drop lie in [0, 1], got "
                f"{self.growth} and {self.max_accuracy_drop}"
            )

    def passes(self, images: int, classes: int) -> float:
        fitting = 1 - self.holdout
        count = round(fitting * images)
        one = self.joint.passes(count, self.suspects)
        distilling = 5 * (self.distilling.epochs(count) + 1)  # two by the teacher, three more
        repair = distilling + (len(STEPS_BACK) + 1) * one
        found = self.joint.passes(count, classes) + len(self.families) * one
        unlearning = self.exposures * unlearning_passes(self.unlearning, images)
        return unlearning + fitting * (found + self.rounds * repair) + 4

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        heldout, fitting = hold_out(clean, self.holdout, generator)
        run = _Run(self, model, fitting, generator, progress)
        run.expose(clean)
        sizes, suspects = run.suspect()
        untouched = Purified(
            model.clone().eval(), ChannelMask({}), run.trace(), {"unlearned": run.exposed[0]}
        )
        if not suspects:
            return untouched
        try:
            repaired = run.repair(sizes, suspects)
        except ConvergenceError as error:
            run.notes.append(f"the repair failed: {error}; the model is returned unchanged")
            return _with(untouched, run, repaired=False)
        judge = Judge(
            model,
            heldout,
            budget=len(clean),
            augmentation=fitting_augmentation(model, fitting),
            generator=generator,
        )
        drop = judge(repaired, threshold=0.0, channels=0).drop
        run.notes.append(f"the repair costs {100 * drop:.1f} points on held-out images")
        if drop > self.max_accuracy_drop:
            run.notes.append(
                f"that is more than {100 * self.max_accuracy_drop:.1f}: the model is returned "
                "unchanged"
            )
            return _with(untouched, run, repaired=False)
        return Purified(
            repaired,
            ChannelMask({}),
            run.trace(),
            {"unlearned": run.exposed[0]},
            {k: t for k, t in run.shown.items() if k in suspects},
        )


def _with(result: Purified, run: _Run, *, repaired: bool) -> Purified:
    return Purified(
        result.model, result.mask, run.trace(repaired=repaired), result.stages, result.triggers
    )


class _Run:
    """One repair on its way."""

    def __init__(
        self,
        settings: JointRepair,
        model: Classifier,
        data: ImageSet,
        generator: torch.Generator,
        progress: Progress,
    ) -> None:
        self.settings, self.model, self.data = settings, model, data
        self.generator, self.progress = generator, progress
        self.clock = Clock()
        self.notes: list[str] = []
        self.phases: dict[str, tuple[Epoch, ...]] = {}
        self.shown: dict[int, Stamp] = {}
        self.exposed: list[Classifier] = []
        self.label: BackdoorLabel | None = None

    def trace(self, *, repaired: bool = True) -> Trace:
        return Trace(
            phases=self.phases,
            label=self.label,
            notes=tuple(self.notes),
            repaired=repaired,
            seconds=self.clock.seconds,
        )

    def expose(self, clean: ImageSet) -> None:
        with self.clock("unlearn"):
            self.exposed, phases, self.label = unlearned(
                self.model,
                clean,
                self.settings.unlearning,
                runs=self.settings.exposures,
                generator=self.generator,
                progress=self.progress,
            )
        self.phases |= phases

    def invert(self, model: Classifier, classes: Sequence[int], family: FamilyName) -> Recovered:
        with self.clock("invert"):
            return invert_jointly(
                model,
                self.exposed,
                self.data,
                classes,
                family,
                self.settings.joint,
                generator=self.generator,
                progress=self.progress,
            )

    def suspect(self) -> tuple[dict[int, float], list[int]]:
        """Sizes of the joint triggers by class, and the classes that stand out, worst first."""
        found = self.invert(self.model, range(self.model.num_classes), "additive")
        indices = dict(zip(found.classes, joint_indices(found.sizes), strict=True))
        order = sorted(indices, key=lambda k: -indices[k])
        suspects = [k for k in order if indices[k] >= self.settings.index]
        suspects = suspects[: self.settings.suspects]
        sizes = dict(zip(found.classes, found.sizes, strict=True))
        for k, trigger, flip in zip(found.classes, found.triggers, found.flips, strict=True):
            if isinstance(trigger, Stamp):
                self.shown[k] = trigger
            if k in suspects:
                self.notes.append(
                    f"class {k} is suspected: its joint trigger has size {sizes[k]:.1f} (anomaly "
                    f"index {indices[k]:.1f}) and sends {flip:.0%} of the other images there"
                )
        if not suspects:
            first = order[0]
            self.notes.append(
                f"no class stands out (highest anomaly index: class {first}, {indices[first]:.1f}, "
                f"needed: {self.settings.index:g}): the model is returned as it came"
            )
        return sizes, suspects

    def repair(self, sizes: dict[int, float], suspects: list[int]) -> Classifier:
        """The repaired model.

        Raises:
            ConvergenceError: no trigger works, or the repair diverged.
        """
        bank: list[tuple[int, Trigger]] = [(k, self.shown[k]) for k in suspects if k in self.shown]
        for family in self.settings.families:
            bank += self._usable(self.invert(self.model, suspects, family))
        if not bank:
            raise ConvergenceError("no recovered trigger works on the model")
        for attempt in range(1, self.settings.rounds + 1):
            distilled = self._distil(bank, attempt)
            fresh = self.invert(distilled, suspects, "additive")
            growth = min(
                size / sizes[k] for k, size in zip(fresh.classes, fresh.sizes, strict=True)
            )
            self.notes.append(
                f"repair {attempt} on {len(bank)} triggers: fresh ones for its model have size "
                f"{', '.join(f'{size:.1f}' for size in fresh.sizes)}, {growth:.1f} times the first"
            )
            if growth >= self.settings.growth or attempt == self.settings.rounds:
                return self._step_back(distilled, suspects, min(fresh.sizes))
            bank += list(zip(fresh.classes, fresh.triggers, strict=True))
            bank += self._usable(self.invert(distilled, suspects, "patch"))
        raise AssertionError("rounds is at least 1")

    def _usable(self, found: Recovered) -> list[tuple[int, Trigger]]:
        return [
            (k, trigger)
            for k, trigger, size, flip in zip(
                found.classes, found.triggers, found.sizes, found.flips, strict=True
            )
            if flip >= self.settings.min_flip and math.isfinite(size)
        ]

    def _step_back(self, distilled: Classifier, suspects: list[int], whole: float) -> Classifier:
        """The first model on the way whose fresh triggers are as large, and one step further."""
        for position, share in enumerate(STEPS_BACK[:-2]):
            between = interpolated(self.model, distilled, share)
            fresh = min(self.invert(between, suspects, "additive").sizes)
            if fresh >= PLATEAU * whole:
                share = STEPS_BACK[position + 1]
                self.notes.append(f"weights: {share:.0%} of the way from the original")
                return interpolated(self.model, distilled, share)
        return distilled

    def _distil(self, bank: Sequence[tuple[int, Trigger]], attempt: int) -> Classifier:
        settings = self.settings.distilling
        working = self.model.clone().eval().to(memory_format=torch.channels_last)
        parameters = list(working.parameters())
        phase = "distil" if attempt == 1 else f"distil {attempt}"
        with self.clock("distil"):
            self.phases[phase] = tuple(
                fit(
                    _distilling(self.model, working, bank, settings),
                    parameters,
                    self.data,
                    optimizer=torch.optim.Adam(parameters, lr=settings.lr),
                    epochs=settings.epochs(len(self.data)),
                    batch_size=settings.batch_size,
                    generator=self.generator,
                    augment=fitting_augmentation(self.model, self.data),
                    schedule=one_cycle,
                    progress=self.progress,
                    phase=phase,
                )
            )
        return working


def _distilling(
    teacher: Classifier,
    student: Classifier,
    bank: Sequence[tuple[int, Trigger]],
    settings: Distilling,
) -> Objective:
    """Clean, mixed and triggered images, all answered as the teacher answers them untriggered."""

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        images, generator = batch.images, batch.generator
        count = len(images)
        with torch.no_grad():
            share = torch.rand(count, 1, 1, 1, generator=generator).to(images)
            partner = torch.randperm(count, generator=generator).to(images.device)
            mixed = share * images + (1 - share) * images[partner]
            clean = torch.cat([images, mixed])
            taught = teacher(clean)
            pictures, innocent = [], []
            for part, rows in zip(
                images.chunk(PARTS), torch.arange(count).chunk(PARTS), strict=True
            ):
                label, trigger = bank[int(torch.randint(len(bank), (), generator=generator))]
                pictures.append(trigger(part))
                innocent.append(taught[rows].argmax(1) != label)
            keep = torch.cat(innocent)
        answers = student(
            torch.cat([clean, *pictures]).contiguous(memory_format=torch.channels_last)
        ).float()
        taught = taught.float()
        first, last = answers[: len(clean)], answers[len(clean) :][keep]
        loss = _divergence(first, taught, settings.temperature)
        if len(last):
            triggered = _divergence(last, taught[:count][keep], settings.temperature)
            loss = loss + settings.weight * triggered
        return loss, (first[:count].detach().argmax(1) == batch.labels).sum()

    return objective


def _divergence(answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened answers from the teacher's, scaled as its gradient asks."""
    return temperature**2 * nn.functional.kl_div(
        (answers / temperature).log_softmax(1),
        (taught / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )


@torch.no_grad()
def interpolated(first: Classifier, second: Classifier, share: float) -> Classifier:
    """A copy of `first` whose weights lie `share` of the way to those of `second`."""
    result = first.clone().eval()
    towards = second.state_dict()
    for name, tensor in result.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(towards[name], share)
    return result
