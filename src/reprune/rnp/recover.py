"""Step 2: recover the clean task with channel masks only (RNP, Section 3.2, Eqn. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.rnp.phase import Fitted, Level, Phase, cross_entropy, run_phase
from reprune.sites import Site
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class Recovering(Phase):
    """Settings of recovering; see `Phase`."""

    level: Level = "filter"
    lr: float = 0.2
    loss_scale: float = 0.2


def recover(
    model: Classifier,
    data: ImageSet,
    settings: Recovering,
    sites: Sequence[Site],
    *,
    start: Sequence[Tensor] | None = None,
    augmentation: Augmentation,
    generator: torch.Generator,
    progress: Progress,
) -> Fitted:
    r"""Minimise the cross-entropy of an unlearned model: $\min_m L(f(x; m \odot \hat\theta), y)$.

    After each step the factors are clipped to [0, 1]. Weights need no gradient at the filter
    level and get none. At the neuron level all weights move instead (RNP, Figure 5).

    Args:
        model: the unlearned classifier.
        start: factors to start from (filter-level unlearning leaves them); ones without it.

    Raises:
        ConvergenceError: the loss became NaN.
    """
    return run_phase(
        model,
        data,
        settings,
        sites,
        cross_entropy,
        name="recover",
        augmentation=augmentation,
        generator=generator,
        progress=progress,
        start=start,
    )
