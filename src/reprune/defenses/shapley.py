"""`ShapleyPruning`: prune the channels that a recovered trigger lives on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.trigger import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Gain
from reprune.defenses.coalition import Sampling, Value, shapley_values
from reprune.defenses.pruning import Fit, PruningDefense, Ranking
from reprune.detection import Inversion, invert
from reprune.errors import ConfigurationError
from reprune.masks import ChannelMask, masked_call
from reprune.precision import autocast
from reprune.results import Trace
from reprune.rnp import Pruning


@dataclass(frozen=True, kw_only=True)
class ShapleyPruning(PruningDefense):
    r"""Shapley pruning: how much each channel contributes to the success of a recovered trigger.

    For every class the smallest trigger is recovered from clean images (`reprune.detection.invert`)
    and the class k* that needs the smallest is taken. With f_S the network that keeps the channels
    S and zeroes all others, the players of the game are the channels and

    $$v(S) = P(f_S(t(x)) = k^*,\; f_S(x) \neq k^*), \qquad a(S) = P(f_S(x) = y)$$

    over a few clean images x of other classes. A channel is suspicious by
    $\phi(v) - w\,\phi(a)$, its Shapley value (`shapley_values`) for the trigger less a share of the
    one for clean accuracy; the most suspicious go first, and only those above zero.

    Where no class has a trigger, there is no v: channels are ranked by $\phi(a)$, and as none is
    suspicious, the dynamic rule prunes nothing; `Trace.notes` says so.

    Source: Guan et al., "Few-shot Backdoor Defense Using Shapley Estimation", CVPR 2022.

    Choices of this package: an image that goes to k* without the trigger too is no success of the
    trigger, so that a network broken down to k* counts as discarded; the share w; halving along
    an order, see `shapley_values`; the numbers of images and evaluations; the smallest trigger in
    place of a test for outliers.

    Attributes:
        inversion: how triggers are recovered.
        sampling: how the Shapley values are sampled; its `evaluations` times `2 * images` are the
            images that pass the network.
        images: clean images of the game at most.
        clean_weight: the share w, at least 0; with 1 a channel that the trigger and the clean task
            need equally is not suspicious.
    """

    inversion: Inversion = field(default_factory=Inversion)
    sampling: Sampling = field(default_factory=Sampling)
    images: int = 64
    clean_weight: float = 1.0

    title: ClassVar[str] = "Shapley pruning"
    source_paper: ClassVar[str] = "Guan et al., CVPR 2022"
    gives: ClassVar[tuple[Gain, ...]] = ("trigger", "removal")

    @classmethod
    def paper(cls) -> ShapleyPruning:
        """The trigger's success alone, and 1 % of the channels pruned.

        The paper reports that less than 1 % of the neurons are infected; the rest as in the class.
        """
        return cls(clean_weight=0.0, pruning=Pruning(by="fraction", amount=0.01), linear=False)

    def check(self) -> None:
        super().check()
        self.inversion.check()
        self.sampling.check()
        if self.images < 1:
            raise ConfigurationError(f"images must be at least 1, got {self.images}")
        if not (math.isfinite(self.clean_weight) and self.clean_weight >= 0):
            raise ConfigurationError(
                f"clean_weight must be finite and at least 0, got {self.clean_weight}"
            )

    def rank_passes(self, images: int, classes: int) -> float:
        played = (self.sampling.evaluations + 1) * 2 * min(self.images, images) / images
        return self.inversion.passes(images, classes) + played

    def rank(self, model: Classifier, fit: Fit) -> Ranking:
        with fit.clock("invert"):
            found = invert(
                model,
                fit.data,
                range(model.num_classes),
                self.inversion,
                generator=fit.generator,
                progress=fit.progress,
            )
        usable = [
            k
            for k, (state, flip) in enumerate(zip(found.states, found.flips, strict=True))
            if state == "found" and flip > 0
        ]
        with fit.clock("shapley"):
            if not usable:
                return self._without_trigger(model, fit)
            smallest = min(usable, key=lambda k: found.sizes[k])
            target, trigger = found.classes[smallest], found.trigger(smallest)
            return self._with_trigger(model, fit, target, trigger, found.sizes[smallest])

    def _with_trigger(
        self, model: Classifier, fit: Fit, target: int, trigger: Stamp, size: float
    ) -> Ranking:
        others = (fit.data.labels != target).nonzero().flatten()
        data = self._draw(fit.data.subset(others), fit.generator)
        shapley = self._play(
            trigger_game(model, fit, data, trigger, target, shift=self.pruning.shift),
            fit,
            (1.0, -self.clean_weight),
        )
        suspicion = shapley[:, 0] - self.clean_weight * shapley[:, 1]
        share = suspicion.clamp_min(0)
        masks = 1 - share / share.max().clamp_min(1e-12)
        masks[suspicion > 0] = masks[suspicion > 0].clamp_max(1 - 1e-6)
        note = (
            f"smallest recovered trigger: {size:.1f} pixels, to class {target}; "
            f"{int((suspicion > 0).sum())} channels contribute to it"
        )
        return Ranking(
            self._by_site(-suspicion, fit),
            self._by_site(masks, fit),
            Trace(notes=(note,)),
            triggers={target: trigger},
        )

    def _without_trigger(self, model: Classifier, fit: Fit) -> Ranking:
        data = self._draw(fit.data, fit.generator)
        shapley = self._play(clean_game(model, fit, data, shift=self.pruning.shift), fit, (1.0,))
        note = "no trigger was recovered for any class: channels are ranked by clean accuracy"
        return Ranking(
            self._by_site(shapley[:, 0], fit),
            self._by_site(torch.ones(len(shapley)), fit),
            Trace(notes=(note,)),
        )

    def _draw(self, data: ImageSet, generator: torch.Generator) -> ImageSet:
        return data.subset(torch.randperm(len(data), generator=generator)[: self.images])

    def _play(self, value: Value, fit: Fit, weights: tuple[float, ...]) -> Tensor:
        return shapley_values(
            value,
            sum(site.channels for site in fit.sites),
            self.sampling,
            weights=weights,
            generator=fit.generator,
            progress=fit.progress,
        )

    def _by_site(self, values: Tensor, fit: Fit) -> tuple[Tensor, ...]:
        return torch.split(values.float(), [site.channels for site in fit.sites])


def trigger_game(
    model: Classifier, fit: Fit, data: ImageSet, trigger: Stamp, target: int, *, shift: bool
) -> Value:
    """The game (v, a) of `ShapleyPruning`; both figures in [0, 1].

    Args:
        model: the classifier.
        fit: where the channels are.
        data: clean images of classes other than `target`.
        trigger: the recovered trigger.
        target: the class that it leads to.
        shift: zero the shift (beta) of the missing channels too.
    """
    clean = data.pixels()
    images = torch.cat([clean, trigger(clean)])

    def value(keep: Tensor) -> tuple[float, ...]:
        before, after = _answers(model, fit, keep, images, shift).chunk(2)
        success = ((after == target) & (before != target)).float().mean()
        accuracy = (before == data.labels).float().mean()
        return tuple(torch.stack([success, accuracy]).tolist())

    return value


def clean_game(model: Classifier, fit: Fit, data: ImageSet, *, shift: bool) -> Value:
    """The game (a) of `ShapleyPruning`; arguments as for `trigger_game`."""
    images = data.pixels()

    def value(keep: Tensor) -> tuple[float, ...]:
        return (float((_answers(model, fit, keep, images, shift) == data.labels).float().mean()),)

    return value


@torch.no_grad()
def _answers(model: Classifier, fit: Fit, keep: Tensor, images: Tensor, shift: bool) -> Tensor:
    """Classes `(n,)` that the network answers with the channels that `keep` holds."""
    factors = torch.split(keep, [site.channels for site in fit.sites])
    mask = ChannelMask.over(fit.sites, factors, shift=shift).to(model.device)
    with autocast(images.device):
        logits = masked_call(model, mask, images)
    return logits.argmax(1)
