"""`PruningDefense`: rank channels by a score, prune within an accuracy budget, fine-tune or not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reprune.attacks.trigger import Stamp
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.defense import Clock, Defense, Purified, check_holdout, hold_out
from reprune.evaluation import fitting_augmentation
from reprune.masks import bake
from reprune.results import Trace
from reprune.rnp import FineTuning, Judge, Pruning, finetune, prune, ranks, site_masks
from reprune.sites import Site, find_sites
from reprune.types import Progress


@dataclass(frozen=True)
class Fit:
    """What a ranking may use.

    Attributes:
        data: the images to fit; those that judge the prune are not among them.
        sites: where the channels are.
        augmentation: crop, and mirror where the model bears it.
        generator, progress: as in `Defense`.
        clock: times the phases.
    """

    data: ImageSet
    sites: tuple[Site, ...]
    augmentation: Augmentation
    generator: torch.Generator
    progress: Progress
    clock: Clock


@dataclass(frozen=True)
class Ranking:
    """How suspicious the channels are.

    Attributes:
        scores: `(channels,)` a site; the lowest are pruned first.
        masks: values in [0, 1] that thresholds and candidates speak of: channels below 1 may be
            pruned. Where `None`, the ranks of the scores: every channel may be.
        trace: evidence; `phases`, `label`, `notes`.
        stages: models on the way.
        triggers: recovered triggers by class.
    """

    scores: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] | None = None
    trace: Trace = field(default_factory=Trace)
    stages: Mapping[str, Classifier] = field(default_factory=dict)
    triggers: Mapping[int, Stamp] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PruningDefense(Defense):
    """A defence that ranks channels and prunes the lowest, judged as in RNP.

    Subclasses implement `rank`.

    Attributes:
        pruning: how many are pruned; the default is the most that stays within 2 points of paired
            accuracy drop on held-out clean images.
        finetuning: afterwards, with pruned channels at zero; `None` for none.
        layers: restrict to these modules or patterns, e.g. `("layer4",)`.
        linear: rank hidden linear layers too; `None` decides by the network, see `find_sites`.
        holdout: share of the defence data that only judges the prune, in (0, 1).
    """

    pruning: Pruning = field(default_factory=Pruning)
    finetuning: FineTuning | None = None
    layers: tuple[str, ...] | None = None
    linear: bool | None = None
    holdout: float = 0.3

    def check(self) -> None:
        check_holdout(self.holdout)
        self.pruning.check()
        if self.finetuning is not None:
            self.finetuning.check()

    @abstractmethod
    def rank(self, model: Classifier, fit: Fit) -> Ranking:
        """The scores of the method; `model` is in evaluation mode and must stay as it is."""

    @abstractmethod
    def rank_passes(self, images: int, classes: int) -> float:
        """Passes of `rank` over its `images`, at most."""

    def passes(self, images: int, classes: int) -> float:
        fitting = 1 - self.holdout
        passes = 2 + fitting * self.rank_passes(round(fitting * images), classes)
        if self.finetuning is not None:
            passes += self.finetuning.epochs * fitting
        return passes + self.pruning.max_evaluations + 1

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        clock = Clock()
        heldout, fitting = hold_out(clean, self.holdout, generator)
        sites = find_sites(model, clean.pixels(slice(0, 2)), linear=self.linear, layers=self.layers)
        augmentation = fitting_augmentation(model, fitting)
        ranking = self.rank(model, Fit(fitting, sites, augmentation, generator, progress, clock))
        with clock("prune"):
            judge = Judge(
                model, heldout, budget=len(clean), augmentation=augmentation, generator=generator
            )
            masks = ranking.masks or torch.split(ranks(ranking.scores), [s.channels for s in sites])
            pruned = prune(
                model,
                sites,
                ranking.scores,
                self.pruning,
                judge,
                masks=masks,
                progress=progress,
            )
            result = bake(model, pruned.mask)
        phases = dict(ranking.trace.phases)
        if self.finetuning is not None:
            with clock("fine-tune"):
                result, phases["fine-tune"] = finetune(
                    model,
                    pruned.mask,
                    fitting,
                    self.finetuning,
                    augmentation=augmentation,
                    generator=generator,
                    progress=progress,
                )
        trace = replace(
            ranking.trace,
            phases=phases,
            masks=site_masks(sites, masks, ranking.scores, pruned.values),
            curve=pruned.curve,
            chosen=pruned.chosen,
            seconds=clock.seconds,
        )
        return Purified(result, pruned.mask, trace, ranking.stages, ranking.triggers)
