"""A-Blend: a blend in random pieces, with cover images (Qi et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Setup, check_rate
from reprune.attacks.blend import blended, random_pixels
from reprune.attacks.goal import as_stored
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, replaced
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet
from reprune.errors import ConfigurationError

BATCH = 500


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(PoisoningAttack):
    r"""`x -> (1 - alpha m) x + alpha m p`, where `m` shows a random half of the pieces of `p`.

    The pattern `p` is cut into `grid x grid` pieces. Each poisoned image gets its own random
    choice of them and the target label; each cover image gets a random choice too and keeps its
    true label, so that a part of the pattern alone does not separate poisoned images from others.
    The attacker's images after training carry all pieces: `x -> (1 - test_alpha) x + test_alpha p`.

    RNP, Table 6: "Mixer Construction", target 0, poisoning rate 0.1. Choices, where that paper
    says nothing: 4 x 4 pieces, half of them left out, and as many cover images as poisoned ones,
    as in Qi et al. (2022); the pattern is random pixels and alpha 0.2, as in `Blend` here (Qi et
    al. blend a picture with 0.15 in training and 0.2 afterwards).

    Attributes:
        cover_rate: share of all training images that are covers, in [0, 1 - rate]; 0 for none.
        alpha: share of the pattern in the pieces of training images, in (0, 1].
        test_alpha: share of the pattern in the attacker's images after training, in (0, 1];
            `alpha` by default.
        grid: pieces along each side of the image, at least 1.
        mask_rate: share of the pieces that a training image does not show, in [0, 1); rounded to
            whole pieces, and at least one piece is shown.
        pattern_seed: seed of the pattern, which is part of the attack.
    """

    title: ClassVar[str] = "A-Blend"
    source_paper: ClassVar[str] = "Qi et al., 2022"

    cover_rate: float = 0.1
    alpha: float = 0.2
    test_alpha: float | None = None
    grid: int = 4
    mask_rate: float = 0.5
    pattern_seed: int = 0

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The attacker's trigger after training for images of `shape` (c, h, w): all pieces.

        Raises:
            ConfigurationError: an alpha outside (0, 1].
        """
        alpha = self.alpha if self.test_alpha is None else self.test_alpha
        return blended(random_pixels(shape, self.pattern_seed), alpha)

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for rates, pieces or alphas that do not fit the images."""
        super().check(data, num_classes)
        blended(torch.zeros(1), self.alpha)
        self.trigger(data.shape)
        _, h, w = data.shape
        if not 1 <= self.grid <= min(h, w):
            raise ConfigurationError(
                f"the grid must be 1 to {min(h, w)} pieces a side for images of {h}x{w}, "
                f"got {self.grid}"
            )
        if not (math.isfinite(self.mask_rate) and 0 <= self.mask_rate < 1):
            raise ConfigurationError(f"the mask rate must lie in [0, 1), got {self.mask_rate}")
        if self.cover_rate != 0:
            check_rate("cover rate", self.cover_rate, len(data))
        if round(self.rate * len(data)) + round(self.cover_rate * len(data)) > len(data):
            raise ConfigurationError(
                f"poisoning rate {self.rate} and cover rate {self.cover_rate} together must not "
                f"exceed 1, got {self.rate + self.cover_rate:g}"
            )

    @torch.no_grad()
    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        generator = setup.generator
        poisons, covers = (round(rate * len(data)) for rate in (self.rate, self.cover_rate))
        index = torch.randperm(len(data), generator=generator)[: poisons + covers].to(data.device)
        pattern = random_pixels(data.shape, self.pattern_seed).to(data.device)
        parts = []
        for rows in torch.split(index, BATCH):
            amount = self.alpha * self._pieces(len(rows), data.shape, generator).to(data.device)
            parts.append(as_stored(torch.lerp(data.pixels(rows), pattern, amount), data))
        labels = data.labels[index]
        labels[:poisons] = self.target
        changed, touched = replaced(data, index, torch.cat(parts), labels)
        covered = torch.zeros_like(touched)
        covered[index[poisons:]] = True
        return Poisoned(changed, touched & ~covered, self.trigger(data.shape), covered)

    def _pieces(
        self, count: int, shape: tuple[int, int, int], generator: torch.Generator
    ) -> Tensor:
        """Which pixels are shown in each of `count` images: `(count, 1, h, w)`, 0 or 1.

        Where the side is no multiple of `grid`, pieces differ by one pixel.
        """
        _, h, w = shape
        pieces = self.grid**2
        shown = max(1, pieces - round(self.mask_rate * pieces))
        chosen = torch.rand(count, pieces, generator=generator).argsort(1)[:, :shown]
        mask = torch.zeros(count, pieces).scatter_(1, chosen, 1.0)
        mask = mask.view(count, 1, self.grid, self.grid)
        rows, columns = (torch.arange(side) * self.grid // side for side in (h, w))
        return mask[:, :, rows][..., columns]
