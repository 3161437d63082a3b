"""The objective that erases a behaviour and keeps the clean task."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError
from reprune.training import Batch, Objective

Suspects = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""A batch to (pixels `(m, c, h, w)`, labels to forget `(m,)`, weights `(m,)` in [0, 1])."""


def erasing(
    suspects: Suspects, loss_cap: float | None, ascent: float = 1.0
) -> Callable[[Classifier], Objective]:
    r"""Keep the clean task and forget what the suspects are answered.

    $$\min_\theta \; E_{(x, y)} L(f(x), y)
      - a \, E_{(x', k)} w \min(L(f(x'), k), c \log K)$$

    K is the number of classes.

    Args:
        suspects: the images $x'$ of a step, the labels $k$ that they shall lose, and weights $w$;
            images of weight 0 do not count.
        loss_cap: c; an image whose loss exceeds c times that of a random guess stops counting,
            `None` lets the loss grow without bound.
        ascent: a, what forgetting weighs beside keeping.

    Source: Li et al., "Anti-Backdoor Learning", NeurIPS 2021, Section 3.3 (global gradient
    ascent); the bound is a choice of this package.
    """

    def bind(model: Classifier) -> Objective:
        cap = math.inf if loss_cap is None else loss_cap * math.log(model.num_classes)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            images, labels, weights = suspects(batch)
            both = torch.cat([batch.images, images])
            logits = model(both).float()
            kept, lost = logits.split([len(batch.images), len(images)])
            losses = nn.functional.cross_entropy(lost, labels, reduction="none").clamp(max=cap)
            forgetting = (weights * losses).sum() / weights.sum().clamp_min(1)
            descent = nn.functional.cross_entropy(kept, batch.labels)
            return descent - ascent * forgetting, (kept.detach().argmax(1) == batch.labels).sum()

        return objective

    return bind


def check_loss_cap(loss_cap: float | None) -> None:
    """Raises `ConfigurationError` unless the cap is `None` or exceeds the loss of a guess."""
    if loss_cap is not None and not loss_cap > 1:
        raise ConfigurationError(
            f"loss_cap counts in losses of a random guess and must exceed 1, got {loss_cap}"
        )
