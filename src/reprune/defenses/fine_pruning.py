"""Fine-Pruning: prune channels that clean images leave silent, then fine-tune (FP, NU+FP)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once
from reprune.defense import Purified
from reprune.defenses.pruning import Fit, PruningDefense, Ranking
from reprune.evaluation import BATCH
from reprune.layers import channels_last, layer_outputs
from reprune.precision import autocast
from reprune.results import Trace
from reprune.rnp import (
    FineTuning,
    Pruning,
    Unlearning,
    check_unlearning,
    unlearn_neurons,
    unlearning_passes,
)
from reprune.sites import Site, find_sites
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class FinePruning(PruningDefense):
    r"""Fine-Pruning: prune the channels that are least active on clean images, then fine-tune.

    $$a_k = \mathbb{E}_{x, \text{positions}} \max(0, z_k(x)), \qquad
      s_k = a_k / \max_j a_j$$

    with $z_k$ the output of the site (after the norm, where there is one) in channel k. The lowest
    $s_k$ are pruned first, as many as the accuracy drop allows; the most active channel of a layer
    is never pruned by the accuracy rule.

    Source: Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
    Networks", RAID 2018, Section 4.

    With `unlearning` (NU+FP: Li et al., ICML 2023, Appendix D and Table 15) the activations are
    those of the unlearned model.

    Choices:
        - The positive part of the site's output stands for the activation after the non-linearity.
        - NU+FP: the original model is pruned, the unlearned one only measured; the source says
          only that removal is performed on the unlearned model.
        - The last convolution is the one that runs last. Of a network with a single convolution
          beside hidden linear layers (a vision transformer) the last hidden linear layer is taken.
        - Rates and epochs of the fine-tuning, where the paper is silent: those of `FineTuning`.

    Attributes:
        pruning: by default the most that stays within 4 points of accuracy drop on held-out clean
            images, as published; Li et al., ICML 2023 (A.3), pruned until CA was below 80 %, which
            for networks of 94 % is a drop of 14 points: `Pruning(max_accuracy_drop=0.14)`.
        finetuning: afterwards; `None` only prunes.
        layers: the layers to prune; `None` is the last convolution.
        unlearning: measure the activations on a model unlearned in this way.

    Example:
        >>> FinePruning.on_unlearned().pruning.max_accuracy_drop
        0.04
    """

    source_paper: ClassVar[str] = "Liu et al., RAID 2018"

    pruning: Pruning = field(default_factory=lambda: Pruning(max_accuracy_drop=0.04))
    finetuning: FineTuning | None = field(default_factory=FineTuning)
    unlearning: Unlearning | None = None

    @property
    def title(self) -> str:
        return "Fine-Pruning" + (" by the unlearned model" if self.unlearning else "")

    @classmethod
    def paper(cls) -> FinePruning:
        """Liu et al.: the last convolution, at most 4 points of accuracy, then fine-tuning."""
        return cls(pruning=Pruning(max_accuracy_drop=0.04), finetuning=FineTuning())

    @classmethod
    def on_unlearned(cls) -> FinePruning:
        """NU+FP: activations of the unlearned model."""
        return cls(unlearning=Unlearning())

    def check(self) -> None:
        super().check()
        if self.unlearning is not None:
            check_unlearning(self.unlearning)

    def rank_passes(self, images: int, classes: int) -> float:
        return 1.0 + (unlearning_passes(self.unlearning, images) if self.unlearning else 0)

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        if self.layers is None:
            sites = find_sites(model, clean.pixels(slice(0, 2)), linear=self.linear)
            last = replace(self, layers=(last_convolution(model, sites).name,))
            return last.purify(model, clean, generator=generator, progress=progress)
        return super().purify(model, clean, generator=generator, progress=progress)

    def rank(self, model: Classifier, fit: Fit) -> Ranking:
        measured, stages, phases = model, {}, {}
        if self.unlearning is not None:
            with fit.clock("unlearn"):
                fitted = unlearn_neurons(
                    model,
                    fit.data,
                    self.unlearning,
                    generator=fit.generator,
                    progress=fit.progress,
                )
            measured = stages["unlearned"] = fitted.model
            phases[fitted.name] = fitted.history
        with fit.clock("activations"):
            means = mean_activations(measured, fit.data, fit.sites, progress=fit.progress)
        scores = tuple(mean / mean.max().clamp_min(1e-12) for mean in means)
        return Ranking(scores, masks=scores, trace=Trace(phases=phases), stages=stages)


def last_convolution(model: Classifier, sites: tuple[Site, ...]) -> Site:
    """The last of `sites` on a convolution; the last of all where at most one is on one."""
    modules = dict(model.network.named_modules())
    convolutions = [site for site in sites if not isinstance(modules[site.layer], nn.Linear)]
    return convolutions[-1] if len(convolutions) > 1 else sites[-1]


@torch.no_grad()
def mean_activations(
    model: Classifier, data: ImageSet, sites: tuple[Site, ...], *, progress: Progress
) -> tuple[Tensor, ...]:
    """Mean positive part of each site's output, over images and positions.

    Returns:
        `(channels,)` a site, float32, at least 0, on the device of the data.
    """
    modules = dict(model.network.named_modules())
    sums = [torch.zeros(site.channels, device=data.device) for site in sites]
    size = at_once(BATCH, data.shape)
    sizes = data.batch_sizes(size)
    names = [site.name for site in sites]
    with model.evaluating(), layer_outputs(model, names) as outputs, autocast(data.device):
        for done, (images, _) in enumerate(data.batches(size), start=1):
            model(images)
            for total, site in zip(sums, sites, strict=True):
                output = outputs[site.name].float().relu()
                channels = channels_last(output, modules[site.name], site.channels)
                total += channels.flatten(0, -2).mean(0) * len(images)
            progress("activations", done, len(sizes))
    return tuple(total / len(data) for total in sums)
