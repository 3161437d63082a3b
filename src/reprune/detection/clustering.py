"""Activation clustering: a poisoned class falls into two unequal groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Need
from reprune.detection.activations import TRACED, by_class, penultimate, principal
from reprune.detection.filtering import Filter, Filtered
from reprune.errors import ConfigurationError
from reprune.results import Trace
from reprune.types import Progress

_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Filter):
    r"""Split each class in two by its features; a small, well separated part is poisoned.

    The penultimate features of the images of a class are reduced to a few components and divided
    by 2-means. The smaller part is flagged if it holds less than `size` of the class and the mean
    silhouette reaches `silhouette`. The score of an image is

    $$s(x) = S_y \frac{d_l(x) - d_s(x)}{d_l(x) + d_s(x)} \in [-1, 1]$$

    with $d_s, d_l$ its distances to the centres of the smaller and the larger part and $S_y$ the
    mean silhouette of its class; positive: in the smaller part.

    Source: Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation
    Clustering", SafeAI 2019. Its independent components are a rotation of the whitened principal
    ones; neither 2-means nor silhouettes change under a rotation, so no ICA is run.

    Choices: both criteria must hold (the paper discusses them side by side); classes with fewer
    than `2 * components` images are not decided, and so flagged.

    Attributes:
        components: dimensions after the reduction.
        whiten: scale each component to unit variance, as ICA does; else plain PCA.
        size: largest share of its class that a poisoned part has, in (0, 0.5].
        silhouette: smallest mean silhouette of a class with a poisoned part, in [-1, 1].
        starts: 2-means is started this often; the tightest split counts.
        steps: iterations of a start at most.
    """

    title: ClassVar[str] = "Activation clustering"
    source_paper: ClassVar[str] = "Chen et al., SafeAI 2019"
    needs: ClassVar[tuple[Need, ...]] = ("training data",)
    scale: ClassVar[str] = "how far towards the smaller part of its class, times the silhouette"
    decides: ClassVar[bool] = True

    components: int = 10
    whiten: bool = True
    size: float = 0.35
    silhouette: float = 0.15
    starts: int = 10
    steps: int = 100

    @classmethod
    def paper(cls) -> ActivationClustering:
        """10 independent components; a silhouette of 0.15, the upper end of its 0.10 to 0.15."""
        return cls()

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("components", "starts", "steps"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.size <= 0.5:
            raise ConfigurationError(f"size must lie in (0, 0.5], got {self.size}")
        if not -1 <= self.silhouette <= 1:
            raise ConfigurationError(f"silhouette must lie in [-1, 1], got {self.silhouette}")

    def passes(self, images: int, classes: int) -> float:
        """The features, and the check that model and images belong together."""
        return 2 + 2 * TRACED / images

    def judge(
        self,
        model: Classifier,
        images: ImageSet,
        clean: ImageSet | None,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Filtered:
        """See the class; the arguments are those of a call.

        Raises:
            ModelError: a network without a linear or convolutional last layer.
        """
        clock = Clock()
        with clock("features"):
            features = penultimate(model, images, progress)
        scores = torch.full((len(images),), torch.nan, device=images.device)
        flagged = torch.ones(len(images), dtype=torch.bool, device=images.device)
        reasons = []
        classes = list(by_class(features, images.labels))
        with clock("clusters"):
            for done, (label, rows) in enumerate(classes, 1):
                if len(rows) >= 2 * self.components:
                    small, found, silhouette = self._split(features[rows], generator)
                    scores[rows] = found
                    share = float(small.float().mean())
                    poisoned = share < self.size and silhouette >= self.silhouette
                    flagged[rows] = small & poisoned
                    if poisoned:
                        reasons.append(
                            f"class {label}: {int(small.sum())} of {len(rows)} images "
                            f"({share:.0%}) form a group of their own (silhouette {silhouette:.2f})"
                        )
                progress("clusters", done, len(classes))
        if not reasons:
            reasons.append("no class falls into two unequal, well separated groups")
        undecided = int(scores.isnan().sum())
        if undecided:
            reasons.append(f"{undecided} images could not be decided and are flagged")
        return Filtered(scores, flagged, None, tuple(reasons), trace=Trace(seconds=clock.seconds))

    def _split(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
        """(in the smaller part, score, mean silhouette) for the images of one class."""
        reduced = self.reduce(features)
        part, centres = two_means(reduced, self.starts, self.steps, generator)
        if 2 * int(part.sum()) > len(part):
            part, centres = ~part, centres.flip(0)
        distances = torch.cdist(reduced, centres)
        to_large, to_small = distances.unbind(1)
        margin = (to_large - to_small) / (to_large + to_small).clamp_min(1e-12)
        mean = float(silhouettes(reduced, part).mean())
        return part, (mean * margin).float(), mean

    def reduce(self, features: Tensor) -> Tensor:
        """Features `(n, width)` to `(n, components)`, or fewer where their rank is lower."""
        centred = features.double()
        centred = centred - centred.mean(0)
        directions, values = principal(centred, self.components)
        kept = values > 1e-6 * values[:1].clamp_min(1e-12)
        reduced = centred @ directions[:, kept]
        if not reduced.shape[1]:
            return centred[:, :1]
        return reduced / reduced.std(0) if self.whiten else reduced


def two_means(
    points: Tensor, starts: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The tightest 2-means split of `starts` tries, each from two points drawn as in k-means++.

    Args:
        points: `(n, d)`.
        starts, steps: tries, and iterations of a try at most.
        generator: a CPU generator.

    Returns:
        `(n,)` bool, true for the second part, and the centres `(2, d)`.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    count, device = len(points), points.device
    draws = torch.rand(starts, 2, generator=generator, dtype=torch.float64).to(device)
    first = points[(draws[:, 0] * count).long().clamp_max(count - 1)]
    away = torch.cdist(first, points).square().cumsum(1)
    second = points[
        torch.searchsorted(away, draws[:, 1:] * away[:, -1:])[:, 0].clamp_max(count - 1)
    ]
    centres = torch.stack([first, second], 1)
    spread = points.square().sum()
    for _ in range(steps):
        near = torch.cdist(centres, points)
        part = near[:, 1] < near[:, 0]
        members = torch.stack([~part, part], 1).to(points.dtype)
        sizes = members.sum(2, keepdim=True)
        moved = torch.where(sizes > 0, members @ points / sizes.clamp_min(1), centres)
        if bool(torch.equal(moved, centres)):
            break
        centres = moved
    loss = spread - (sizes * centres.square().sum(2, keepdim=True)).sum((1, 2))
    best = loss.argmin()
    near = torch.cdist(centres[best], points)
    return near[1] < near[0], centres[best]


def silhouettes(points: Tensor, part: Tensor) -> Tensor:
    r"""How well each point lies in its part: $(b - a) / \max(a, b)$, `(n,)` in [-1, 1].

    $a$ is the mean distance to the other points of its part, $b$ that to the points of the other
    part; 0 for a point that is alone, or where one part is empty.

    Source: Rousseeuw, 1987.
    """
    members = torch.stack([~part, part], 1).to(points.dtype)
    sizes = members.sum(0)
    if float(sizes.min()) == 0:
        return torch.zeros_like(points[:, 0])
    found = []
    for rows in torch.split(torch.arange(len(points), device=points.device), _ROWS):
        sums = torch.cdist(points[rows], points) @ members
        own = members[rows]
        alone = (own @ sizes) <= 1
        a = (sums * own).sum(1) / (own @ sizes - 1).clamp_min(1)
        b = (sums / sizes * (1 - own)).sum(1)
        value = (b - a) / torch.maximum(a, b).clamp_min(1e-300)
        found.append(value.masked_fill(alone, 0.0))
    return torch.cat(found)
