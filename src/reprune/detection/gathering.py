"""`Gathering`: the searches of a scan, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from reprune.attacks.goal import Goal, triggered
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import NO_END, Deadline
from reprune.defense import Clock
from reprune.detection.agreement import lone_doubt
from reprune.detection.evidence import Evidence, agreeing, rivals
from reprune.detection.families import ALONE_FAMILIES, FamilyName
from reprune.detection.inversion import invert
from reprune.detection.joint import Recovered, favourite, invert_jointly
from reprune.detection.margins import largest_margins
from reprune.detection.narrowing import MANY, chosen, short_searches
from reprune.detection.neural_cleanse import FEWEST_CLASSES
from reprune.detection.signs import JOINT, MARGINS
from reprune.detection.unlearned_label import unlearned
from reprune.detection.waves import lead_by_waves
from reprune.errors import ConvergenceError, TimeLimitError
from reprune.evaluation import ELSEWHERE, predict
from reprune.metrics import histogram
from reprune.results import Sign
from reprune.types import Progress, Trigger

if TYPE_CHECKING:
    from reprune.detection.scan import Scan

T = TypeVar("T")

Look = Callable[[Evidence], Evidence]

JOINT_FAMILIES: tuple[FamilyName, ...] = ("additive", "smooth")
"""Families of the joint search."""

PATIENCE = 3
"""A second look takes so many times as many steps or starts."""

NOT_UNLEARNED = "no copies were unlearned: a search in the model alone accuses the model"
"""Note of a scan that goes without them."""

HURRIED = "there was no time for all searches: those that were made make the model suspicious"


class Gathering:
    """The searches in one model. Each uses the same random numbers with and without the others.

    Args:
        scan: the settings.
        model: the classifier; it is not changed.
        clean: clean labelled images.
        generator: of all random numbers.
        progress: see `Progress`.
        patience: after it a model that a search makes suspicious is not searched any further.
    """

    def __init__(
        self,
        scan: Scan,
        model: Classifier,
        clean: ImageSet,
        generator: torch.Generator,
        progress: Progress,
        patience: Deadline = NO_END,
    ) -> None:
        self.patience = patience
        self.scan, self.model, self.clean = scan, model, clean
        self.generator, self.progress = generator, progress
        self.twin = generator.clone_state()
        self.clock = Clock()
        self.comparable = model.num_classes >= FEWEST_CLASSES
        self.classes = list(range(model.num_classes))

    def __call__(self) -> Evidence:
        """All that the settings ask for, without unlearned copies where none could be made.

        What makes the model suspicious stands where no time is left for the other searches.

        Raises:
            TimeLimitError: no time is left, and nothing does.
        """
        evidence = self._patches()
        for search in self._searches():
            try:
                if self.patience.passed and self._suspicious(evidence):
                    evidence = evidence.noted(HURRIED)
                    break
                evidence = search(evidence)
            except TimeLimitError as late:
                if not self._suspicious(evidence):
                    raise
                evidence = evidence.noted(
                    f"{late} in the scan: what it saw makes the model suspicious"
                )
                break
        return replace(evidence, seconds=self.clock.seconds)

    def _patches(self) -> Evidence:
        """The first search, for the classes that all searches for triggers are for."""
        scan, classes = self.scan, self.model.num_classes
        if scan.joint is not None and classes > MANY:
            generator = self.twin.clone_state()
            with self.clock("narrow"):
                eases = short_searches(
                    self.model,
                    self.clean,
                    scan.cleanse.inversion,
                    scan.joint,
                    generator=generator,
                    progress=self.progress,
                )
            self.classes = chosen(list(eases.values()), generator)
        with self.clock("invert"):
            inverted = invert(
                self.model,
                self.clean,
                self.classes,
                scan.cleanse.inversion,
                generator=self.generator,
                progress=self.progress,
            )
        return Evidence(inverted, label=scan.label, of=classes)

    def _searches(self) -> Iterator[Look]:
        """What follows the first search, in order."""
        scan = self.scan
        if scan.margins is not None and self.comparable:
            yield self.margins
        if scan.waves is not None and self.comparable:
            yield self.waves
        if scan.joint is not None and self.comparable:
            others = self.twin.clone_state()
            for family in ALONE_FAMILIES:
                generator = self.generator if family == ALONE_FAMILIES[0] else others
                yield partial(self.alone, family=family, generator=generator)
            yield partial(self.elsewhere, generator=others)
        if scan.unlearning is not None and scan.label is None:
            yield self.copies
        yield self.again

    def _suspicious(self, evidence: Evidence) -> bool:
        """Whether there is an accusation, or a doubt that no second look could settle."""
        signs = self.scan.signs(evidence)
        lone = lone_doubt(signs, self.scan.clear)
        if lone is not None and (lone.search == MARGINS or lone.search.startswith(JOINT)):
            return False
        return any(sign.strength >= self.scan.clear for sign in signs)

    def margins(self, evidence: Evidence) -> Evidence:
        """How far each class can be ahead of the others."""
        return replace(evidence, margins=self._look("margins", largest_margins, self.scan.margins))

    def waves(self, evidence: Evidence) -> Evidence:
        """Where plain waves lead."""
        return replace(evidence, waves=self._look("waves", lead_by_waves, self.scan.waves))

    def alone(self, evidence: Evidence, family: FamilyName, generator: torch.Generator) -> Evidence:
        """Triggers of a family in the model, for every class."""
        with self.clock(f"invert {family}"):
            found = self._invert((), self.classes, family, generator)
        return replace(evidence, alone={**evidence.alone, family: found})

    def elsewhere(self, evidence: Evidence, generator: torch.Generator) -> Evidence:
        """A picture that leads each image to any class but its own."""
        with self.clock("invert elsewhere"):
            away = self._invert((), [ELSEWHERE], "additive", generator)
            flows = self._flows(away.triggers[0])
        return replace(evidence, elsewhere=away, flows=flows)

    def copies(self, evidence: Evidence) -> Evidence:
        """What unlearned copies tell; where none are made the notes say why.

        None are of a model that a search in it alone accuses, for copies never accuse.
        """
        if any(sign.strength >= 1 for sign in self.scan.signs(evidence)):
            return evidence.noted(NOT_UNLEARNED)
        state = self.twin.get_state()
        try:
            return self._copies(evidence)
        except ConvergenceError as error:
            self.twin.set_state(state)
            return evidence.noted(
                f"copies could not be unlearned, so that only triggers speak: {error}"
            )

    def _copies(self, evidence: Evidence) -> Evidence:
        """Unlearned copies, and triggers that work in them, too."""
        scan, classes = self.scan, self.model.num_classes
        assert scan.unlearning is not None
        failures: list[str] = []
        with self.clock("unlearn"):
            exposed, phases, label = unlearned(
                self.model,
                self.clean,
                scan.unlearning,
                runs=scan.exposures,
                generator=self.twin,
                progress=self.progress,
                failures=failures,
            )
        counts = [histogram(predict(copy, self.clean).argmax(1), classes) for copy in exposed]
        kept = agreeing(counts)
        exposed, counts = [exposed[i] for i in kept], [counts[i] for i in kept]
        evidence = evidence.noted(*(f"not unlearned: {failure}" for failure in failures))
        evidence = replace(evidence, label=label, exposed=exposed, phases=phases)
        if not evidence.alone:
            return evidence
        few = rivals(evidence.alone["additive"], counts)
        with self.clock("invert jointly"):
            joint = {
                family: self._invert(exposed, few, family, self.twin) for family in JOINT_FAMILIES
            }
        favourites = {
            family: favourite(found, counts, scan.exposures) for family, found in joint.items()
        }
        return replace(evidence, joint=joint, favourites=favourites)

    def again(self, evidence: Evidence) -> Evidence:
        """A second look, where one search alone makes the model doubtful, or none does.

        Where no time is left for it a doubt stands, and without one there is no verdict.

        Raises:
            TimeLimitError: no time is left.
        """
        signs = self.scan.signs(evidence)
        lone = lone_doubt(signs, self.scan.clear)
        if lone is None:
            unusual = any(sign.strength >= self.scan.clear for sign in signs)
            if unusual or not evidence.alone:
                return evidence
            return self._filters(evidence, self.classes)
        try:
            return self._settle(evidence, lone)
        except TimeLimitError as late:
            return evidence.noted(f"{late} before the doubt could be looked into: it stands")

    def _settle(self, evidence: Evidence, lone: Sign) -> Evidence:
        """A second look at what the only sign of a doubt says."""
        scan = self.scan
        if lone.search.startswith(JOINT):
            few = next(iter(evidence.joint.values())).classes
            return self._filters(evidence, few, times=PATIENCE)
        if lone.search == MARGINS and scan.margins is not None and evidence.margins is not None:
            with self.clock("look again"):
                more = largest_margins(
                    self.model,
                    self.clean,
                    replace(scan.margins, starts=PATIENCE * scan.margins.starts),
                    generator=self.twin,
                    progress=self.progress,
                )
            return replace(evidence, margins=evidence.margins.furthest(more))
        return evidence

    def _filters(self, evidence: Evidence, classes: Sequence[int], times: int = 1) -> Evidence:
        """With filters that lead to these classes in the model alone."""
        with self.clock("look again"):
            filters = self._invert((), classes, "filter", self.twin, times)
        return replace(evidence, alone={**evidence.alone, "filter": filters})

    def _look(self, name: str, search: Callable[..., T], settings: object) -> T:
        """A search in the model that takes no random numbers from the others."""
        with self.clock(name):
            return search(
                self.model,
                self.clean,
                settings,
                generator=self.twin.clone_state(),
                progress=self.progress,
            )

    def _invert(
        self,
        exposed: Sequence[Classifier],
        classes: Sequence[int],
        family: FamilyName,
        generator: torch.Generator,
        times: int = 1,
    ) -> Recovered:
        """In the model alone without copies; in so many times as many steps."""
        assert self.scan.joint is not None
        joint = replace(self.scan.joint, steps=times * self.scan.joint.steps)
        return invert_jointly(
            self.model,
            exposed or (self.model,),
            self.clean,
            classes,
            family,
            joint if exposed else replace(joint, weight=0.0),
            generator=generator,
            progress=self.progress,
            phase=f"invert {family}" + " jointly" * bool(exposed),
        )

    def _flows(self, trigger: Trigger) -> list[list[int]]:
        """By class of the images, the histogram of the answers with the trigger."""
        answers = predict(self.model, triggered(self.clean, trigger, Goal(None))).argmax(1)
        classes = self.model.num_classes
        return [histogram(answers[self.clean.labels == k], classes) for k in range(classes)]
