"""Pure functions on predictions and counts."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor


def wilson_interval(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, both ends in [0, 1].

    Source: Wilson, 1927. Returns (0, 1) where there is nothing to count.

    Example:
        >>> low, high = wilson_interval(90, 100)
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / total / 2) ** 2)
    low = centre - half if hits > 0 else 0.0  # exact where rounding would miss the ends
    high = centre + half if hits < total else 1.0
    return low, high


def paired_drop(before: Tensor, after: Tensor, labels: Tensor) -> float:
    """Accuracy lost from `before` to `after` on the same images, in [-1, 1].

    All three are class indices `(n,)`. What both get right or both get wrong cancels, which is why
    a paired difference sees less than the noise of two separate accuracies.
    """
    lost = (before == labels) & (after != labels)
    won = (before != labels) & (after == labels)
    return float((lost.sum() - won.sum()) / len(labels))


def disagreement(before: Tensor, after: Tensor) -> float:
    """Share of images on which two sets of predictions `(n,)` differ, in [0, 1]."""
    return float((before != after).float().mean())


def brier_score(logits: Tensor, labels: Tensor) -> float:
    r"""Mean squared error of the probabilities, in [0, 2]: lower is better.

    $$\frac{1}{n} \sum_i \sum_k (p_k(x_i) - [y_i = k])^2$$

    It sees smaller differences between classifiers than their accuracies do.

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950.

    Args:
        logits: `(n, classes)`.
        labels: `(n,)`, class indices.

    Example:
        >>> brier_score(torch.zeros(1, 2), torch.tensor([1]))
        0.5
    """
    wanted = torch.nn.functional.one_hot(labels, logits.shape[1])
    return float((logits.float().softmax(1) - wanted).square().sum(1).mean())


def histogram(predictions: Tensor, num_classes: int) -> list[int]:
    """How often each class is predicted."""
    return torch.bincount(predictions.cpu(), minlength=num_classes).tolist()


def defense_effectiveness(asr_drop: float, ca_drop: float) -> float:
    r"""Defence effectiveness rating (DER), in [0, 1]; 0.5 for a defence that changes nothing.

    $$\mathrm{DER} = \frac{\max(0, \Delta\mathrm{ASR}) - \max(0, \Delta\mathrm{CA}) + 1}{2}$$

    Source: Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
    Minimization", ICCV 2023, Section 4.1.

    Args:
        asr_drop, ca_drop: what ASR and CA fell by, in percentage points.

    Example:
        >>> defense_effectiveness(100.0, 0.0)
        1.0
    """
    return (max(0.0, asr_drop) - max(0.0, ca_drop) + 100) / 200
