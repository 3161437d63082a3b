"""Step 3: prune the channels of the original model whose masks fell (RNP, Section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import predict
from reprune.masks import ChannelMask, bake
from reprune.metrics import disagreement, paired_drop
from reprune.results import PruningPoint, SiteMask
from reprune.sites import Site
from reprune.types import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Settings of pruning.

    Attributes:
        by: "dynamic" takes the largest prune whose accuracy drop stays within `max_accuracy_drop`;
            "threshold" prunes every channel whose mask is at most `amount`; "fraction" that share
            of all channels, "count" that many, lowest scores first.
        amount: threshold, fraction in [0, 1] or count; unused by "dynamic".
        max_accuracy_drop: paired accuracy drop allowed on held-out clean images, in [0, 1].
        shift: prune scale and shift (beta), so that the channel is gone, or the scale only, which
            leaves the constant beta behind. Where a norm that is not the site reads a pruned
            convolution (one without weights, or behind a ReLU), it makes a constant of the zeros
            either way: minus its running mean, scaled as ever.
        candidates: "dynamic" prunes only channels whose mask is below this.
        max_evaluations: prunes that "dynamic" may judge; the original is judged once besides.
    """

    by: Literal["dynamic", "threshold", "fraction", "count"] = "dynamic"
    amount: float | None = None
    max_accuracy_drop: float = 0.02
    shift: bool = True
    candidates: float = 1.0
    max_evaluations: int = 7

    def check(self) -> None:
        """Raises ConfigurationError for settings that cannot work."""
        if self.by not in ("dynamic", "threshold", "fraction", "count"):
            raise ConfigurationError(
                f"by must be dynamic, threshold, fraction or count, got {self.by!r}"
            )
        if self.by != "dynamic" and (self.amount is None or self.amount < 0):
            raise ConfigurationError(
                f"pruning by {self.by} needs an amount >= 0, got {self.amount}"
            )
        if self.by == "fraction" and self.amount is not None and self.amount > 1:
            raise ConfigurationError(f"a fraction must lie in [0, 1], got {self.amount}")
        if not 0 <= self.max_accuracy_drop <= 1:
            raise ConfigurationError(
                f"max_accuracy_drop must lie in [0, 1], got {self.max_accuracy_drop}"
            )
        if self.max_evaluations < 1:
            raise ConfigurationError(
                f"max_evaluations must be at least 1, got {self.max_evaluations}"
            )


class Judge:
    """Scores pruned models against the original on held-out clean images, pairwise.

    The images are judged as they are and, to see smaller differences, in augmented copies, as many
    as fit into `budget` images. The original answers them once.

    Args:
        model: the original classifier.
        heldout: clean images that no fitting has seen.
        budget: largest number of images of one evaluation.
    """

    def __init__(
        self,
        model: Classifier,
        heldout: ImageSet,
        *,
        budget: int,
        augmentation: Augmentation,
        generator: torch.Generator,
    ) -> None:
        copies = [heldout.pixels()]
        for _ in range(budget // len(heldout) - 1):
            copies.append(augmentation(copies[0], generator))
        self.model = model
        self.data = ImageSet(torch.cat(copies), heldout.labels.repeat(len(copies)))
        self.before = predict(model, self.data).argmax(1)
        self.evaluations = 0

    @property
    def mistaken(self) -> float:
        """Share of the images that the original answers wrongly."""
        return float((self.before != self.data.labels).float().mean())

    def __call__(self, repaired: Classifier, *, threshold: float, channels: int) -> PruningPoint:
        """Judge one repaired model; counts as one evaluation."""
        self.evaluations += 1
        after = predict(repaired, self.data).argmax(1)
        return PruningPoint(
            threshold=threshold,
            channels=channels,
            accuracy=float((after == self.data.labels).float().mean()),
            drop=paired_drop(self.before, after, self.data.labels),
            disagreement=disagreement(self.before, after),
        )


@dataclass(frozen=True)
class Pruned:
    """The chosen mask (`values[i]` is 0 or 1 a channel of site i), and the judged candidates."""

    mask: ChannelMask
    values: tuple[Tensor, ...]
    curve: tuple[PruningPoint, ...]
    chosen: int


class Order:
    """The channels of a network in the order in which they are pruned.

    Args:
        sites: where the channels are.
        scores: `(channels,)` a site; the lower the more suspicious.
        settings: which channels may be pruned.
        masks: the recovered masks, which thresholds and `candidates` speak of; the scores
            themselves where they are masks.

    Attributes:
        eligible: how many channels may be pruned.
        scores: of all channels, in order.

    Raises:
        ConfigurationError: settings outside their range.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Sequence[Tensor],
        settings: Pruning,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        settings.check()
        flat = torch.cat(list(scores)).cpu()
        mask_values = flat if masks is None else torch.cat(list(masks)).cpu()
        allowed = torch.ones(len(flat), dtype=torch.bool)
        if settings.by == "dynamic":
            allowed = mask_values < settings.candidates
        elif settings.by == "threshold":
            allowed = mask_values <= (settings.amount or 0)
        self._sites, self._settings = sites, settings
        self._order = torch.where(allowed, flat, torch.inf).argsort(stable=True)
        self.eligible = int(allowed.sum())
        self.scores = flat[self._order]

    def __len__(self) -> int:
        return len(self._order)

    @property
    def fixed(self) -> int:
        """How many channels the settings ask for; all that are eligible if they do not say."""
        amount = self._settings.amount or 0
        if self._settings.by == "fraction":
            return round(amount * len(self))
        return min(int(amount), len(self)) if self._settings.by == "count" else self.eligible

    def values(self, count: int) -> tuple[Tensor, ...]:
        """Factors a site: 0 for the first `count` channels, 1 for the others."""
        keep = torch.ones(len(self))
        keep[self._order[:count]] = 0
        return tuple(torch.split(keep, [site.channels for site in self._sites]))

    def mask(self, count: int) -> ChannelMask:
        """The mask that prunes the first `count` channels."""
        return ChannelMask.over(self._sites, self.values(count), shift=self._settings.shift)


def prune(
    model: Classifier,
    sites: Sequence[Site],
    scores: Sequence[Tensor],
    settings: Pruning,
    judge: Judge,
    *,
    masks: Sequence[Tensor] | None = None,
    progress: Progress = silent,
) -> Pruned:
    """Choose which channels to prune from the original model.

    "dynamic" bisects on a geometric grid of channel counts, so it needs at most
    `settings.max_evaluations` evaluations whatever the size of the network. The empty prune needs
    none: it is the original.

    Args:
        model: the original classifier.
        sites, scores, settings, masks: as in `Order`.
        judge: judges candidates on held-out clean images.

    Raises:
        ConfigurationError: settings outside their range.
    """
    order = Order(sites, scores, settings, masks)
    curve: dict[int, PruningPoint] = {}

    def judged(count: int) -> PruningPoint:
        threshold = float(order.scores[count - 1]) if count else float("-inf")
        pruned = bake(model, order.mask(count).to(model.device))
        point = judge(pruned, threshold=threshold, channels=count)
        curve[count] = point
        progress("prune", len(curve), settings.max_evaluations, channels=count, drop=point.drop)
        return point

    if settings.by == "dynamic":
        count = _largest(
            order.eligible,
            settings.max_evaluations,
            lambda n: judged(n).drop <= settings.max_accuracy_drop,
        )
    else:
        count = order.fixed
        if count:
            judged(count)
    before = float((judge.before == judge.data.labels).float().mean())
    curve[0] = PruningPoint(float("-inf"), 0, before, 0.0, 0.0)
    counts = sorted(curve)
    return Pruned(
        order.mask(count).to(model.device),
        order.values(count),
        tuple(curve[n] for n in counts),
        counts.index(count),
    )


def _largest(limit: int, evaluations: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `limit` that fits, by bisection on a geometric grid from 0."""
    size = 2**evaluations - 1
    if limit <= size:
        grid = list(range(limit + 1))
    else:
        grid = sorted({0, *(int(limit ** ((i + 1) / size) + 0.5) for i in range(size))})
    low, high = 0, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(grid[middle]):
            low = middle
        else:
            high = middle
    return grid[low]


def ranks(values: Sequence[Tensor]) -> Tensor:
    """Share of all channels whose value is lower than a channel's own, flat, in [0, 1)."""
    flat = torch.cat(list(values))
    return torch.searchsorted(flat.sort().values, flat).float() / len(flat)


def site_masks(
    sites: Sequence[Site],
    masks: Sequence[Tensor],
    scores: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> tuple[SiteMask, ...]:
    """The evidence by site: mask values, scores, and the channels whose `kept` factor is zero."""
    return tuple(
        SiteMask(
            site.name,
            site.layer,
            tuple(mask.tolist()),
            tuple(score.tolist()),
            tuple((keep == 0).nonzero().flatten().tolist()),
        )
        for site, mask, score, keep in zip(sites, masks, scores, kept, strict=True)
    )
