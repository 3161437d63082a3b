"""Recover triggers for suspected classes, from a model and from its repaired copy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from statistics import median

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import NO_END, Deadline
from reprune.defenses.distilling import Lesson
from reprune.defenses.trigger_bank import INNOCENTS, Bank, Kept, Search, TriggerSearch
from reprune.detection import FAMILIES, Evidence, FamilyName, Inverted, Recovered, invert_jointly
from reprune.detection.evidence import natural_filter, natural_warp
from reprune.detection.signs import FAMILY_OF
from reprune.evaluation import ELSEWHERE, flip_rate
from reprune.results import Sign
from reprune.types import Progress

WEAK_WAVE, STRONG_WAVE = 0.5, 3.0
"""Waves teach from this part of the amplitude that they were found with, up to so many times it."""


def recover_triggers(
    model: Classifier,
    evidence: Evidence,
    data: ImageSet,
    suspects: Sequence[int],
    favoured: Sequence[int],
    settings: TriggerSearch,
    *,
    accused: bool,
    support: Sequence[Sign] = (),
    generator: torch.Generator,
    progress: Progress,
    patience: Deadline = NO_END,
) -> Bank:
    """Triggers that work on the model and are clearly smaller than natural ones.

    Natural are those that innocent classes need. Where no trigger for the first suspect is small
    but the model is accused, all that work are taken. Where it is not accused, larger ones teach,
    too, and judge nothing: those of searches in the model alone that name a suspect, and without
    any, where it has small ones, those of all searches. What leads to a class from far meets there
    with what an attacker would use.

    Args:
        model: the classifier; it is not changed.
        evidence: of a scan of it.
        data: clean images.
        suspects: classes, the likeliest first.
        favoured: those of them that the unlearned copies favour, whose joint searches count.
        settings: see `TriggerSearch`.
        accused: whether the scan called the model backdoored.
        support: of a model that is not accused, see `reprune.detection.agreement.supporting`.
        patience: after it no kind but the first is sought for a suspect.
    """
    named = {(s.label, Search(FAMILY_OF[s.search])) for s in support if s.search in FAMILY_OF}
    more = {kind for _, kind in named}.difference(settings.searches)
    settings = replace(settings, searches=(*settings.searches, *more))
    search = _Recovery(model, evidence, data, suspects, settings, generator, progress, patience)
    kinds: list[tuple[list[Kept], list[Kept]]] = []
    sure = accused or bool(support)
    for place, label in enumerate(suspects):
        usable, waves = search.usable(label, jointly=label in favoured), search.waves(label)
        small = [[one for one in some if search.is_small(kind, one)] for kind, some in usable]
        if accused and not (waves or any(small)) and not (place and any(few for few, _ in kinds)):
            small = [some for _, some in usable]
        telling = [
            some if (label, kind) in named or (any(small) and not sure) else few
            for (kind, some), few in zip(usable, small, strict=True)
        ]
        kinds += zip((*telling, waves), (*small, waves), strict=True)
    others = () if sure else tuple(search.others())
    bank = _divided(kinds, settings.lessons)
    return replace(bank, others=others, hurried=search.hurried)


def _divided(kinds: Iterable[tuple[list[Kept], list[Kept]]], count: int) -> Bank:
    """Of each kind the first `count` that may teach, and what remains of those that may judge.

    Where none remains of any kind, those that teach judge, too.
    """
    lessons: list[Kept] = []
    judges: list[Kept] = []
    for teaching, judging in kinds:
        lessons += teaching[:count]
        judges += judging[count:]
    return Bank(tuple(lessons), tuple(judges or lessons))


def overlooked(
    repaired: Classifier,
    evidence: Evidence,
    data: ImageSet,
    suspects: Sequence[int],
    settings: TriggerSearch,
    *,
    repelled: Collection[int] = (),
    generator: torch.Generator,
    progress: Progress,
) -> dict[FamilyName, Bank]:
    """Triggers that lead a repaired model to a suspect more easily than is natural, by family.

    Added pictures, sharp and smooth, to classes that it was repelled from: those that are smaller
    than any innocent class needed in the model that it came from, for repelling leaves larger ones
    only. And filters that are smaller than those to any class of models without a backdoor, and
    clearly than those to other classes of the repaired one; filters of the model alone hardly ever
    teach, so that they find what triggers put aside, which are like the lessons, do not. Where
    images may be led anywhere nothing is natural.

    Args:
        repaired: the classifier; it is not changed.
        evidence: of a scan of the model that it came from.
        data: clean images.
        suspects: classes.
        settings: see `TriggerSearch`, whose `looks` are sought.
        repelled: those of the suspects that pictures are sought for, too.
    """
    found: dict[FamilyName, Bank] = {}
    for family in settings.looks:
        kind, of_filters = Search(family), family == "filter"
        labels = [k for k in suspects if k != ELSEWHERE and (of_filters or k in repelled)]
        known = evidence.alone.get(family)
        least = min(_innocent(known, suspects), default=0.0) if known else 0.0
        if not labels or not (of_filters or least):
            continue
        seen = Evidence(evidence.inverted) if of_filters else evidence
        only = replace(settings, searches=(kind,))
        search = _Recovery(repaired, seen, data, suspects, only, generator, progress)
        if of_filters:
            others = search.natural.get(kind, math.inf)
            least = min(natural_filter(evidence), settings.smaller * others)
        kinds = []
        for label in labels:
            [(_, some)] = search.usable(label, jointly=False)
            small = [one for one in some if one.size < least]
            kinds.append((small, small))
        bank = _divided(kinds, settings.lessons)
        if bank.lessons:
            found[family] = bank
    return found


def _innocent(found: Recovered | Inverted, suspects: Sequence[int]) -> list[float]:
    """Sizes of the triggers that lead to classes which nobody suspects."""
    return [
        size
        for label, size in zip(found.classes, found.sizes, strict=True)
        if label not in suspects and math.isfinite(size)
    ]


class _Recovery:
    """The searches in one model, and the sizes that its innocent classes need."""

    def __init__(
        self,
        model: Classifier,
        evidence: Evidence,
        data: ImageSet,
        suspects: Sequence[int],
        settings: TriggerSearch,
        generator: torch.Generator,
        progress: Progress,
        patience: Deadline = NO_END,
    ) -> None:
        self.patience, self.hurried = patience, False
        self.model, self.evidence, self.data = model, evidence, data
        self.suspects, self.settings = suspects, settings
        self.generator, self.progress = generator, progress
        self.natural: dict[Search, float] = {}
        self._measure_natural()

    def usable(self, label: int, *, jointly: bool) -> list[tuple[Search, list[Kept]]]:
        """By kind, the triggers of a class that work on the model."""
        settings = self.settings
        found: list[tuple[Search, list[Kept]]] = []
        for search in settings.searches:
            if search.joint and not jointly:
                continue
            if found and self.patience.passed:
                self.hurried = True
                break
            classes = [label] * (settings.lessons + 1)
            where = "elsewhere" if label == ELSEWHERE else f"class {label}"
            recovered = self._find(classes, search, f"recover {search}, {where}")
            some = [
                Kept(size, Lesson(trigger, self._exaggeration(search, size), label))
                for trigger, size in zip(recovered.triggers, recovered.sizes, strict=True)
                if not math.isnan(size)
                and flip_rate(self.model, self.data, trigger, label) >= settings.min_flip
            ]
            found.append((search, some))
        return found

    def others(self) -> list[Kept]:
        """The scan's added pictures, sharp and smooth, for classes that are not suspected."""
        strongest, alone = self.settings.everywhere, self.evidence.alone
        if strongest is None:
            return []
        return [
            Kept(size, Lesson(trigger, strongest, label))
            for found in (alone.get("additive"), alone.get("smooth"))
            if found is not None
            for label, trigger, size in zip(found.classes, found.triggers, found.sizes, strict=True)
            if label not in self.suspects and math.isfinite(size)
        ]

    def waves(self, label: int) -> list[Kept]:
        """The scan's waves to a class, where they pull much harder there than anywhere else."""
        led, settings = self.evidence.waves, self.settings
        if led is None or not led.usable:
            return []
        leader, ratio = led.leader()
        if leader != label or ratio * settings.smaller <= 1:
            return []
        weak = WEAK_WAVE * led.amplitude
        return [
            Kept(weak, Lesson(led.waves[i].stamp(self.data.shape, weak), STRONG_WAVE, label))
            for i in led.best(label)[: settings.lessons + 1]
            if led.chances[i, label] >= settings.min_flip
        ]

    def is_small(self, search: Search, one: Kept) -> bool:
        """Whether a trigger is clearly smaller than natural ones, where these are known."""
        natural = self.natural.get(search)
        return natural is None or one.size < self.settings.smaller * natural

    def _find(self, classes: Sequence[int], search: Search, phase: str) -> Recovered:
        """Triggers of the model for these classes, which may repeat."""
        exposed, joint = self.evidence.exposed, self.settings.joint
        alone = not search.joint or not exposed
        return invert_jointly(
            self.model,
            exposed or (self.model,),
            self.data,
            classes,
            search.family,
            replace(joint, weight=0.0) if alone else joint,
            generator=self.generator,
            progress=self.progress,
            phase=phase,
        )

    def _measure_natural(self) -> None:
        seen = self.evidence
        self._remember(Search("patch"), seen.inverted)
        known = {Search(family, joint=True): found for family, found in seen.joint.items()}
        known |= {Search(family): found for family, found in seen.alone.items()}
        for search, found in known.items():
            self._remember(search, found)
        self.natural.setdefault(Search("warp"), natural_warp(seen))
        others = [k for k in range(self.model.num_classes) if k not in self.suspects][:INNOCENTS]
        for search in self.settings.searches:
            if self.patience.passed:
                break
            if others and not search.joint and search not in self.natural:
                self._remember(search, self._find(others, search, f"recover natural {search}"))

    def _remember(self, search: Search, found: Recovered | Inverted) -> None:
        if innocent := _innocent(found, self.suspects):
            self.natural[search] = median(innocent)

    def _exaggeration(self, search: Search, size: float) -> float:
        """How many times as strong a trigger is as large as a natural one of the same search."""
        natural = self.natural.get(search)
        if natural is None or not 0 < size < natural:
            return 1.0
        family = FAMILIES[search.family]
        ratio = math.pow(natural / size, 1 / family.power)
        return min(ratio, family.farthest, self.settings.strongest)
