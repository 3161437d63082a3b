"""`Scan`: is the model backdoored, and towards which class?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import NO_END, Deadline
from reprune.defense import Gain
from reprune.detection import narrowing
from reprune.detection.agreement import agreement_sign, by_class, settled
from reprune.detection.calibration import among_clean
from reprune.detection.detector import Detector, Scanned
from reprune.detection.evidence import (
    NATURAL_WARP,
    RIVALS,
    Evidence,
    natural_added,
    natural_filter,
    natural_warp,
)
from reprune.detection.families import ALONE_FAMILIES
from reprune.detection.gathering import JOINT_FAMILIES, PATIENCE, Gathering
from reprune.detection.inversion import Inversion
from reprune.detection.joint import Joint
from reprune.detection.margins import MarginSearch
from reprune.detection.neural_cleanse import FEWEST_CLASSES, NeuralCleanse
from reprune.detection.signs import (
    DOUBTFUL,
    PATCHES,
    accusing,
    added_signs,
    ahead_sign,
    elsewhere_sign,
    filter_sign,
    joint_sign,
    one_of_each,
    outlying,
    several_signs,
    smooth_sign,
    warp_sign,
    wave_sign,
)
from reprune.detection.waves import WaveSearch
from reprune.errors import ConfigurationError
from reprune.evaluation import ELSEWHERE
from reprune.results import (
    BackdoorLabel,
    ClassScore,
    Finding,
    Sign,
    Trace,
    clearly,
    strongest,
)
from reprune.rnp import Unlearning, check_unlearning, unlearning_passes
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class Scan(Detector):
    """Eight searches: seven in the model, one in it together with unlearned copies.

    1. *Neural Cleanse* on the model: masks and patterns, whose sizes are compared over the classes.
       It finds what small or sharp triggers leave.
    2. *Added pictures* on the model, compared in the same way: they find patches in networks
       where every class has a small patch.
    3. *Smooth pictures*: added ones of half the resolution, where the next class must need far
       more, too. They find blends and warps.
    4. *Warps*: no small one leads all images to one class without a backdoor.
    5. *All-to-all*: an added picture that leads each image to any class but its own. Without a
       backdoor it is larger than those to one class, and leads the classes to few aims.
    6. *Largest margins*: how far each class can be ahead of all others, whatever the picture. A
       backdoor may make its class win by far more than any other can.
    7. *Waves*: plain sinusoids of many frequencies. Of pictures that nobody optimised none leads
       nearly all images to one class, far more than to any other, without a backdoor.
    8. *Joint inversion*: the model is unlearned on the clean images, several times; for every class
       the smallest picture is sought that, added to images, leads there in the model and in the
       copies, once of full and once of half resolution; both have to name one class. A backdoor
       often survives the unlearning and pulls the copies to its class. It sees global triggers as
       well, but copies of a clean model fall to some class, too, and sometimes to one that
       natural pictures lead to: it is a reason for doubt and never accuses. A copy that favours
       another class than most is left out, for now and then one loses the backdoor, too, and
       counts against them. Of many classes those are searched that the copies favour and those
       that need the smallest pictures in the model alone. A model that one of the other searches
       accuses is not unlearned.

    Each search gives a sign, the second and first several where several classes stand out. From a
    strength of 1 on a sign accuses the model, and below `clear` it does not count, unless several
    searches name one class (`agreement_sign`): a backdoor that hardly took shows a little in each
    of them. Where several classes are targets, what the others need is not usual: where two or
    more classes, but at most half of all, need an added picture far smaller than any class does
    without a backdoor, each of them is accused (`several_signs`). The strongest decides, and is
    the scan's score (`Finding.strength`). The label of the unlearned copies alone decides
    nothing, for clean models collapse to one class, too.

    Where nothing is unusual, or where a model is doubtful because of the joint search or of largest
    margins alone, there is a second look. After the joint search, filters are sought in the model
    alone: where the smallest leads to another class, nothing but the copies speaks for a backdoor,
    and copies of clean models do as much. Largest margins are sought from more starts. Where
    nothing is unusual, filters are sought for all classes: one that is clearly smaller than the
    others and than natural ones is a reason for doubt.

    Of more than 64 classes some are searched for triggers: those that short searches lead to most
    easily, and others by chance to compare them with (`reprune.detection.narrowing`).

    Source: Wang et al., "Neural Cleanse", S&P 2019; unlearned models after Li et al., ICML 2023,
    Appendix D; the other searches, the combination and its bounds are this package's.

    Attributes:
        cleanse: the first search and its bounds. It has no doubts of its own here; `clear` is for
            all searches.
        index, ratio: bounds of the second and third search: anomaly index of the smallest picture,
            and its share of the lower quartile of the sizes, in (0, 1). (Of many classes some need
            far less than the median without any backdoor.) More of one makes up for less of the
            other. `ratio` bounds the fifth search and filters, too.
        gap: bound of the third search beside these: how many times as large the next class's
            picture must be, above 1; and of filters.
        bent: bound of the fourth search: mean squared steps, in pixels of images of 32 x 32.
        margins: settings of the sixth search; `None` goes without it.
        ahead: its bound: how many times as large a margin must be as the next class's, above 1.
        waves: settings of the seventh search; `None` goes without it.
        pull: of that, how many times as hard as to any other class a wave that accuses pulls,
            greater than 1; see `Led`.
        led: and the mean probability of the class with that wave, in (0, 1].
        unlearning: how copies are unlearned; `None` goes without them and the eighth search.
        exposures: unlearned copies of a model that is not accused without them, each with its own
            random order.
        joint: settings of all searches but the first, sixth and seventh; `None` goes without them.
        doubt: strength of a `Favourite` of the eighth search from which it is a reason for doubt.
        clear: strength of a sign, in (0, 1], below which it is no reason for doubt.
        label: the label where somebody computed it already; then nothing is unlearned.
    """

    title: ClassVar[str] = "Triggers of the model, and of it together with its unlearned copies"
    source_paper: ClassVar[str] = "Wang et al., S&P 2019; Li et al., ICML 2023; this package"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger")

    cleanse: NeuralCleanse = field(
        default_factory=lambda: NeuralCleanse(inversion=Inversion(steps=200, images=16), clear=0.0)
    )
    index: float = 3.0
    ratio: float = 0.45
    gap: float = 2.0
    bent: float = 2.0
    margins: MarginSearch | None = field(default_factory=MarginSearch)
    ahead: float = 1.5
    waves: WaveSearch | None = field(default_factory=WaveSearch)
    pull: float = 4.0
    led: float = 0.9
    unlearning: Unlearning | None = field(default_factory=Unlearning)
    exposures: int = 3
    joint: Joint | None = field(default_factory=Joint)
    doubt: float = 0.385
    clear: float = 0.9
    label: BackdoorLabel | None = None

    def given(self, label: BackdoorLabel | None) -> Scan:
        """The same scan with this label, or without any, and nothing to unlearn."""
        return replace(self, unlearning=None, label=label)

    @property
    def trains(self) -> bool:
        return self.unlearning is not None and self.label is None

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
        if self.margins is not None:
            self.margins.check()
        if self.waves is not None:
            self.waves.check()
        if self.exposures < 1:
            raise ConfigurationError(f"exposures must be at least 1, got {self.exposures}")
        for name, least in (("index", 0), ("doubt", 0), ("ahead", 1), ("gap", 1), ("pull", 1)):
            if not getattr(self, name) > least:
                raise ConfigurationError(
                    f"{name} must be greater than {least}, got {getattr(self, name)}"
                )
        if not 0 < self.bent < NATURAL_WARP:
            raise ConfigurationError(f"bent must lie in (0, {NATURAL_WARP:g}), got {self.bent}")
        if not 0 < self.led <= 1:
            raise ConfigurationError(f"led must lie in (0, 1], got {self.led}")
        if not (0 < self.ratio < 1 and 0 < self.clear <= 1):
            raise ConfigurationError(
                f"ratio must lie in (0, 1) and clear in (0, 1], got {self.ratio} and {self.clear}"
            )

    def passes(self, images: int, classes: int) -> float:
        few, passes = classes, 0.0
        if self.joint is not None:
            few, passes = narrowing.count(classes), narrowing.passes(images, classes)
        passes += self.cleanse.passes(images, few)
        if self.margins is not None and classes >= FEWEST_CLASSES:
            passes += (1 + PATIENCE) * self.margins.passes(images, classes)
        if self.waves is not None and classes >= FEWEST_CLASSES:
            passes += self.waves.passes(images)
        joint = self.joint if classes >= FEWEST_CLASSES else None
        if joint is not None:
            alone = (len(ALONE_FAMILIES) + 1) * few + 1  # with filters
            passes += replace(joint, weight=0.0).passes(images, alone)
        if self.unlearning is not None and self.label is None:
            passes += self.exposures * (unlearning_passes(self.unlearning, images) + 1)
            if joint is not None:
                rivals = min(classes, RIVALS)
                passes += len(JOINT_FAMILIES) * joint.passes(images, rivals)
                passes += PATIENCE * replace(joint, weight=0.0).passes(images, rivals)
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
        patience: Deadline = NO_END,
    ) -> Evidence:
        """All searches. Each uses the same random numbers with and without the others.

        Copies that cannot be unlearned are left out, and the notes say why. Without any it never
        says "clean". After `patience` a suspicious model is not searched any further.

        Raises:
            TimeLimitError: `progress` raised it before a search made the model suspicious.
        """
        return Gathering(self, model, clean, generator, progress, patience)()

    def judge(self, evidence: Evidence) -> Scanned:
        """The verdict on what was seen."""
        finding = self.cleanse.judge(evidence.inverted, evidence.label)
        trace = Trace(
            phases=dict(evidence.phases),
            label=evidence.label,
            notes=evidence.told,
            seconds=dict(evidence.seconds),
        )
        signs = self.signs(evidence)
        found = [*evidence.alone.values(), evidence.elsewhere, *evidence.joint.values()]
        broken = any(one is not None and any(map(math.isnan, one.sizes)) for one in found)
        for seen in (evidence.margins, evidence.waves):
            broken |= seen is not None and not seen.usable
        first = strongest(signs)
        if first is not None and first.strength >= 1:
            finding = replace(finding, verdict="backdoored", target=first.label, signs=tuple(signs))
            named = by_class(signs)
            accusers = [first, *(named[label][0] for label in finding.targets[1:])]
            accusations = [
                f"{sign.reason} (strength {sign.strength:.2f}, needed: 1)"
                for sign in accusers
                if not (sign is first and sign.search == PATCHES)
            ]
            finding = replace(finding, reasons=(*accusations, *finding.reasons))
        elif broken:
            said = "the outputs became NaN or infinite in the searches"
            finding = replace(finding, verdict="undecided", reasons=(said, *finding.reasons))
        elif finding.verdict == "clean" and evidence.notes and not evidence.exposed:
            doubts = self._doubts(first) or finding.reasons
            finding = replace(finding, verdict="undecided", reasons=(*evidence.notes, *doubts))
        elif finding.verdict == "clean" and self._doubts(first):
            finding = replace(finding, verdict="undecided", reasons=self._doubts(first))
        elif finding.verdict == "clean" and first is not None and first.search != PATCHES:
            said = f"{first.reason} (strength {first.strength:.2f}, needed: 1)"
            finding = replace(finding, reasons=(*finding.reasons, said))
        if first is not None:
            finding = replace(finding, strength=first.strength, suspect=first.label)
            whole = evidence.favourites or first.strength >= 1  # which copies cannot change
            if finding.verdict != "clean" and whole and self == Scan():
                compared = among_clean(first.strength)
                finding = replace(finding, reasons=(*finding.reasons, compared))
        finding = replace(finding, signs=tuple(signs))
        return Scanned(finding, evidence.inverted, trace)

    def signs(self, evidence: Evidence) -> list[Sign]:
        """What each search says."""
        finding = self.cleanse.judge(evidence.inverted, evidence.label)
        signs = []
        usable = [score for score in finding.scores if score.state in ("found", "saturated")]
        if len(finding.scores) >= FEWEST_CLASSES and usable:
            sizes = [s.size for s in finding.scores if s.size is not None and s.state != "empty"]
            found = sorted(usable, key=lambda score: -score.index)
            signs += accusing([self._patch_sign(score, median(sizes), finding) for score in found])
        alone = evidence.alone
        if "additive" in alone:
            signs += added_signs(alone["additive"], self.index, self.ratio, evidence.of)
            signs += elsewhere_sign(evidence, self.ratio)
        if "smooth" in alone:
            signs += smooth_sign(alone["smooth"], self.index, self.ratio, self.gap, evidence.of)
        if "warp" in alone:
            signs += warp_sign(alone["warp"], natural_warp(evidence), self.bent / NATURAL_WARP)
        if evidence.margins is not None and evidence.margins.usable:
            signs += ahead_sign(evidence.margins, self.ahead)
        if evidence.waves is not None and evidence.waves.usable:
            signs += wave_sign(evidence.waves, self.pull, self.led)
        if evidence.favourites:
            signs += joint_sign(evidence.favourites, self.doubt, self.clear)
        if "filter" in alone:
            filters = filter_sign(alone["filter"], self.gap, natural_filter(evidence), self.ratio)
            signs = settled([*signs, *filters], self.clear)
        if "additive" in alone:
            several = several_signs(alone["additive"], natural_added(evidence), self.ratio)
            signs = one_of_each([*signs, *several])
        return signs + agreement_sign(signs, self.clear)

    def _doubts(self, first: Sign | None) -> tuple[str, ...]:
        """What makes a model doubtful that nothing accuses."""
        if first is None or first.strength < self.clear:
            return ()
        bounds = f"strength {first.strength:.2f}, needed: 1, clean is below {self.clear:g}"
        return (f"{first.reason} ({bounds})",)

    def _patch_sign(self, score: ClassScore, usual: float, finding: Finding) -> Sign:
        """What Neural Cleanse says of one class; its own verdict decides whether it accuses.

        It takes classes without a patch for ones that need the whole image; `usual` is the median
        without them.
        """
        share = (score.size or 0.0) / usual
        strength = min(outlying(score.index, share, self.cleanse.index, self.cleanse.ratio))
        if finding.verdict != "backdoored":
            strength = min(strength, DOUBTFUL)
        elif score.label == finding.target:
            strength = max(strength, 1.0)
        reason = (
            f"class {score.label} needs a patch of only {score.size or 0:.1f} pixels, {share:.0%} "
            f"of the median {usual:.1f} over the classes that have one (anomaly index "
            f"{score.index:.1f})"
        )
        return Sign(PATCHES, score.label, strength, reason)

    def suspects(self, evidence: Evidence) -> list[int]:
        """Classes that a backdoor may lead to, the likeliest first; none for a clean verdict.

        `ELSEWHERE` stands for all-to-all.
        """
        finding = self.judge(evidence).finding
        if finding.verdict == "clean":
            return []
        signs = sorted(finding.signs, key=lambda sign: -sign.strength)
        if not signs:  # too few classes to compare
            ranked = sorted(finding.scores, key=lambda score: -score.index)
            return [score.label for score in ranked[:1]]
        accused = finding.verdict == "backdoored"
        enough = max(self.clear, clearly(signs) if accused else 0.0)
        named = [sign.label for sign in signs if sign.strength >= enough] or [signs[0].label]
        return list(dict.fromkeys(ELSEWHERE if k is None else k for k in named))
