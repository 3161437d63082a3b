"""`Scan`: is the model backdoored, and towards which class?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Gain
from reprune.detection.detector import Detector, Scanned
from reprune.detection.inversion import Inverted
from reprune.detection.joint import Favourite, Joint, Recovered, favourite, invert_jointly
from reprune.detection.neural_cleanse import FEWEST_CLASSES, NeuralCleanse
from reprune.detection.unlearned_label import unlearned
from reprune.errors import ConfigurationError
from reprune.evaluation import predict
from reprune.metrics import histogram
from reprune.results import BackdoorLabel, Epoch, Finding, Trace
from reprune.rnp import Unlearning, check_unlearning, unlearning_passes
from reprune.types import Progress


@dataclass(frozen=True)
class Evidence:
    """What a scan saw, before any verdict.

    Attributes:
        inverted: masks and patterns for every class, recovered from the model alone.
        label: the class that unlearned copies favour, if any was unlearned.
        exposed: the unlearned copies, of which those are left that favour the same class.
        joint: pictures to add for every class, which work in the model and in the copies.
        favourite: what these and the copies agree on.
        phases: epochs of the unlearning.
        seconds: by phase.
    """

    inverted: Inverted
    label: BackdoorLabel | None = None
    exposed: Sequence[Classifier] = ()
    joint: Recovered | None = None
    favourite: Favourite | None = None
    phases: Mapping[str, tuple[Epoch, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scan(Detector):
    """Two searches for triggers: in the model, and in the model together with unlearned copies.

    1. *Neural Cleanse* on the model: masks and patterns, whose sizes are compared over the classes.
       It finds what small or sharp triggers leave.
    2. *Joint inversion*: the model is unlearned on the clean images, several times; for every class
       the smallest picture is sought that, added to images, leads there in the model and in the
       copies. A backdoor survives the unlearning and pulls the copies to its class; natural
       features do not. It finds global triggers as well. A copy that favours another class than
       most is left out: now and then one loses the backdoor, too.

    Either may accuse the model; it is called clean where neither sees anything. The label of the
    unlearned copies alone decides nothing, for clean models collapse to one class, too.

    Source: Wang et al., "Neural Cleanse", S&P 2019; unlearned models after Li et al., ICML 2023,
    Appendix D; the joint inversion, the combination and its bounds are this package's.

    Attributes:
        cleanse: the first search and its bounds.
        unlearning: how copies are unlearned; `None` goes without them and the second search.
        exposures: unlearned copies, each with its own random order.
        joint: the second search; `None` goes without it.
        sure: strength of the favourite (`Favourite`) from which a model is called backdoored.
        clear: strength below which it is no reason for doubt.
        label: the label where somebody computed it already; then nothing is unlearned.
    """

    title: ClassVar[str] = "Triggers of the model, and of it together with its unlearned copies"
    source_paper: ClassVar[str] = "Wang et al., S&P 2019; Li et al., ICML 2023; this package"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger")

    cleanse: NeuralCleanse = field(default_factory=NeuralCleanse)
    unlearning: Unlearning | None = field(default_factory=Unlearning)
    exposures: int = 3
    joint: Joint | None = field(default_factory=Joint)
    sure: float = 0.45
    clear: float = 0.3
    label: BackdoorLabel | None = None

    def given(self, label: BackdoorLabel | None) -> Scan:
        """The same scan with this label, or without any, and nothing to unlearn."""
        return replace(self, unlearning=None, label=label)

    def check(self) -> None:
        self.cleanse.check()
        if self.cleanse.unlearning is not None:
            raise ConfigurationError(
                "a scan looks for triggers in the model itself: leave out the unlearning of "
                "`cleanse`, or use NeuralCleanse.on_unlearned()"
            )
        if self.unlearning is not None:
            check_unlearning(self.unlearning)
        if self.joint is not None:
            self.joint.check()
        if self.exposures < 1:
            raise ConfigurationError(f"exposures must be at least 1, got {self.exposures}")
        if not 0 < self.clear <= self.sure:
            raise ConfigurationError(
                f"clear must be positive and at most sure, got {self.clear} and {self.sure}"
            )

    def passes(self, images: int, classes: int) -> float:
        passes = self.cleanse.passes(images, classes)
        if self.unlearning is not None and self.label is None:
            passes += self.exposures * unlearning_passes(self.unlearning, images)
            if self.joint is not None:
                passes += self.joint.passes(images, classes)
        return passes

    def examine(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Scanned:
        return self.judge(self.gather(model, clean, generator=generator, progress=progress))

    def gather(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Evidence:
        """Both searches. The first uses the same random numbers with and without the second.

        Raises:
            ConvergenceError: unlearning diverged.
        """
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        scanned = self.cleanse.examine(model, clean, generator=generator, progress=progress)
        assert scanned.inverted is not None
        if self.unlearning is None or self.label is not None:
            seconds = scanned.trace.seconds
            return Evidence(scanned.inverted, self.label, seconds=seconds)
        clock = Clock()
        with clock("unlearn"):
            exposed, phases, label = unlearned(
                model,
                clean,
                self.unlearning,
                runs=self.exposures,
                generator=twin,
                progress=progress,
            )
        counts = [histogram(predict(copy, clean).argmax(1), model.num_classes) for copy in exposed]
        agreeing = _agreeing(counts)
        exposed, counts = [exposed[i] for i in agreeing], [counts[i] for i in agreeing]
        evidence = Evidence(scanned.inverted, label, exposed, phases=phases)
        if self.joint is not None and model.num_classes >= FEWEST_CLASSES:
            with clock("invert jointly"):
                joint = invert_jointly(
                    model,
                    exposed,
                    clean,
                    range(model.num_classes),
                    "additive",
                    self.joint,
                    generator=twin,
                    progress=progress,
                )
            evidence = replace(evidence, joint=joint, favourite=favourite(joint, counts))
        return replace(evidence, seconds=clock.seconds | scanned.trace.seconds)

    def judge(self, evidence: Evidence) -> Scanned:
        """The verdict on what was seen."""
        finding = self.cleanse.judge(evidence.inverted, evidence.label)
        trace = Trace(
            phases=dict(evidence.phases), label=evidence.label, seconds=dict(evidence.seconds)
        )
        found, joint = evidence.favourite, evidence.joint
        if found is None or joint is None:
            return Scanned(finding, evidence.inverted, trace)
        reason = (
            f"class {found.label} needs the smallest picture added to work in the model and in "
            f"its unlearned copies, {math.exp(found.gap):.1f} times smaller than the next class; "
            f"each copy sends at least {found.share:.0%} of the clean images there"
        )
        strength = f"{reason} (strength {found.strength:.2f}"
        if any(math.isnan(size) for size in joint.sizes):
            broken = "the outputs became NaN or infinite in the joint search"
            verdict = "undecided" if finding.verdict == "clean" else finding.verdict
            finding = replace(finding, verdict=verdict, reasons=(broken, *finding.reasons))
        elif found.strength >= self.sure:
            finding = Finding(
                "backdoored",
                (f"{strength}, needed: {self.sure:g})", *finding.reasons),
                found.label if finding.target is None else finding.target,
                finding.scores,
            )
        elif found.strength >= self.clear and finding.verdict == "clean":
            finding = Finding(
                "undecided",
                (f"{strength}, clean is below {self.clear:g})", *finding.reasons),
                None,
                finding.scores,
            )
        else:
            weak = f"{strength}, needed: {self.sure:g})"
            finding = replace(finding, reasons=(*finding.reasons, weak))
        return Scanned(finding, evidence.inverted, trace)

    def suspects(self, evidence: Evidence) -> list[int]:
        """Classes that a backdoor may lead to, the likeliest first; none for a clean verdict."""
        finding = self.judge(evidence).finding
        if finding.verdict == "clean":
            return []
        ranked = sorted(finding.scores, key=lambda score: -score.index)
        named = [] if finding.target is None else [finding.target]
        if evidence.favourite is not None and evidence.favourite.strength >= self.clear:
            named.append(evidence.favourite.label)
        if self.cleanse.judge(evidence.inverted).verdict != "clean":
            named += [score.label for score in ranked[:1]]
        return list(dict.fromkeys(named))


def _agreeing(histograms: Sequence[Sequence[int]]) -> list[int]:
    """The copies that favour the class which most of them favour."""
    favourites = [max(range(len(counts)), key=counts.__getitem__) for counts in histograms]
    most = max(favourites, key=favourites.count)
    return [i for i, label in enumerate(favourites) if label == most]
