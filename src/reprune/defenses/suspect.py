"""Which class is suspected, and the trigger that leads to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock
from reprune.detection import Inversion, Inverted, anomaly_indices, invert
from reprune.evaluation import flip_rate, predict
from reprune.results import BackdoorLabel, Epoch
from reprune.rnp import Unlearning, backdoor_label, unlearn_neurons
from reprune.types import Progress

ENOUGH = 20
"""Images that an unlearned model must still answer differently to be inverted on these alone."""


@dataclass(frozen=True)
class Suspect:
    """A class, the trigger recovered for it, its pixels, and what it does to the original."""

    label: int
    trigger: Stamp
    size: float
    flip: float


@dataclass
class Course:
    """What a run gathers on its way."""

    model: Classifier
    clean: ImageSet
    generator: torch.Generator
    progress: Progress
    clock: Clock = field(default_factory=Clock)
    notes: list[str] = field(default_factory=list)
    stages: dict[str, Classifier] = field(default_factory=dict)
    phases: dict[str, tuple[Epoch, ...]] = field(default_factory=dict)
    label: BackdoorLabel | None = None

    def unlearned(self, settings: Unlearning) -> Classifier:
        """The model unlearned on the images, computed once."""
        if "unlearned" not in self.stages:
            with self.clock("unlearn"):
                fitted = unlearn_neurons(
                    self.model,
                    self.clean,
                    settings,
                    generator=self.generator,
                    progress=self.progress,
                )
                self.phases[fitted.name] = fitted.history
                self.stages["unlearned"] = fitted.model
        return self.stages["unlearned"]


@dataclass(frozen=True)
class Hunt:
    """How a suspect is found; the fields are those of `TriggerRepair`.

    With `fallback`, what the unlearned model does not give away is sought on the original.
    """

    inversion: Inversion
    unlearning: Unlearning | None
    index: float
    min_flip: float
    fallback: bool = True

    def __call__(self, course: Course) -> Suspect | None:
        """The suspect, or `None` with the reason in `course.notes`."""
        suspect = None
        if self.unlearning is not None:
            suspect = self._unlearned(course, self.unlearning)
        if suspect is None and (self.fallback or self.unlearning is None):
            classes = range(course.model.num_classes)
            found = self._search(course, course.model, course.clean, classes, "original model")
            suspect = self._usable(course, found)
        return suspect

    def _unlearned(self, course: Course, unlearning: Unlearning) -> Suspect | None:
        """What the unlearned model gives away, if it holds on the original."""
        unlearned = course.unlearned(unlearning)
        course.label = backdoor_label([unlearned], course.clean)
        images = course.clean
        classes = range(unlearned.num_classes)
        named = course.label.label
        if named is not None:
            classes = range(named, named + 1)
            elsewhere = (predict(unlearned, images).argmax(1) != named) & (images.labels != named)
            if int(elsewhere.sum()) >= ENOUGH:
                images = images.subset(elsewhere.nonzero().flatten())
        found = self._search(course, unlearned, images, classes, "unlearned model")
        suspect = self._usable(course, found)
        if suspect is None and self.fallback:
            course.notes.append("the trigger is recovered on the original model instead")
        return suspect

    def _search(
        self,
        course: Course,
        model: Classifier,
        images: ImageSet,
        classes: range,
        where: str,
    ) -> Suspect | None:
        """The most anomalous of `classes` in `model`, with its flip rate in the original."""

        def progress(_: str, done: int, total: int, /, **figures: float) -> None:
            course.progress(f"invert the {where}", done, total, **figures)

        with course.clock("invert"):
            inverted = invert(
                model,
                images,
                classes,
                self.inversion,
                generator=course.generator,
                progress=progress,
            )
            _, height, width = images.shape
            best, note = most_anomalous(inverted, height * width, self.index)
            course.notes.append(f"{where}: {note}")
            if best is None:
                return None
            label, trigger = inverted.classes[best], inverted.trigger(best)
            flip = flip_rate(course.model, course.clean, trigger, label)
            return Suspect(label, trigger, inverted.sizes[best], flip)

    def _usable(self, course: Course, suspect: Suspect | None) -> Suspect | None:
        if suspect is None or suspect.flip >= self.min_flip:
            return suspect
        course.notes.append(
            f"the trigger for class {suspect.label} sends only {suspect.flip:.0%} of the other "
            f"images there in the original model (needed: {self.min_flip:.0%}): not used"
        )
        return None


def most_anomalous(inverted: Inverted, pixels: int, least: float) -> tuple[int | None, str]:
    """Position of the class whose trigger is smallest beside the others', and why (not)."""
    found = [k for k, state in enumerate(inverted.states) if state == "found"]
    if not found:
        states = ", ".join(sorted(set(inverted.states)))
        count = len(inverted.classes)
        return None, f"no trigger was recovered for any of {count} classes (searches: {states})"
    compared = [k for k, s in enumerate(inverted.states) if s not in ("empty", "broken")]
    values = anomaly_indices([inverted.sizes[k] for k in compared], pixels)
    indices = dict(zip(compared, values, strict=True))
    best = max(found, key=lambda k: indices[k])
    said = f"class {inverted.classes[best]} needs a trigger of {inverted.sizes[best]:.1f} pixels"
    if len(indices) == 1:
        return best, said
    said += f" (anomaly index {indices[best]:.1f})"
    if indices[best] <= least:
        return None, f"no class stands out: {said}, the index must exceed {least:g}"
    return best, said
