"""How far each class can be ahead of all others, whatever the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once
from reprune.detection.joint import FARTHEST
from reprune.errors import ConfigurationError
from reprune.folding import folded
from reprune.precision import autocast
from reprune.types import Progress, silent


@dataclass(frozen=True, kw_only=True)
class MarginSearch:
    """Settings of `largest_margins`.

    Attributes:
        steps: of Adam, at least 1.
        lr: its rate, positive, in pixels of range [0, 1].
        starts: pictures a class of noise, and as many of clean images, at least 1.
        chunk: pictures in one forward pass at most, fewer of large ones, but all of one class
            together; bounds memory.
    """

    steps: int = 80
    lr: float = 0.03
    starts: int = 3
    chunk: int = 480

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("steps", "starts", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ConfigurationError(f"lr must be positive, got {self.lr}")

    def passes(self, images: int, classes: int) -> float:
        """Images through the network, over `images`, for all classes."""
        return 2 * self.starts * self.steps * classes / images


@dataclass(frozen=True)
class Margins:
    """How far each class gets ahead, by pictures that started as noise and as clean images.

    Attributes:
        noise, images: one margin a class: its own logit minus the largest other one.
    """

    noise: tuple[float, ...]
    images: tuple[float, ...]

    @property
    def usable(self) -> bool:
        """Whether all are finite."""
        return all(map(math.isfinite, self.noise + self.images))

    def furthest(self, other: Margins) -> Margins:
        """The larger margins of two searches."""
        return Margins(
            tuple(map(max, self.noise, other.noise)), tuple(map(max, self.images, other.images))
        )

    def leader(self) -> tuple[int, float] | None:
        """The class that is furthest ahead, and how many times as far as the next one, at least 1.

        `None` where both kinds of starts do not name the same class, or it is behind; the ratio
        is the smaller of both, and at most `FARTHEST`.
        """
        ratios, labels = [], set()
        for values in (self.noise, self.images):
            first, second = sorted(range(len(values)), key=lambda k: -values[k])[:2]
            if not values[first] > 0:
                return None
            labels.add(first)
            ratios.append(min(values[first] / max(values[second], 1e-6), FARTHEST))
        return (labels.pop(), min(ratios)) if len(labels) == 1 else None


def largest_margins(
    model: Classifier,
    data: ImageSet,
    settings: MarginSearch,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Margins:
    r"""For each class, the margin that pictures reach by gradient ascent, of the best start.

    $$r_k = \max_{x \in [0, 1]^d} \left( f_k(x) - \max_{j \ne k} f_j(x) \right)$$

    A backdoor is trained to win over everything that is in the picture, so that its class can be
    ahead further than others, whatever its trigger looks like.

    Source: Wang et al., "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
    Backdoor Pattern Types Using a Maximum Margin Statistic", S&P 2024, Section III; the starts at
    clean images, and the ratio to the next class instead of a p-value, are this package's.

    Args:
        model: the classifier; it is not changed.
        data: clean images, for half of the starts.
        settings: see `MarginSearch`.
        generator: of the starts.

    Raises:
        ConfigurationError: settings out of their range.
    """
    settings.check()
    device, classes = data.device, model.num_classes
    noise = torch.rand(settings.starts, *data.shape, generator=generator).to(device)
    rows = torch.randint(len(data), (settings.starts,), generator=generator).to(device)
    starts = torch.cat([noise, data.pixels(rows)])
    together = max(1, at_once(settings.chunk, data.shape) // len(starts))
    parts = torch.split(torch.arange(classes, device=device), together)
    found = []
    for number, part in enumerate(parts):
        pictures = starts.repeat(len(part), 1, 1, 1).requires_grad_(True)
        labels = part.repeat_interleave(len(starts))
        optimizer = torch.optim.Adam([pictures], lr=settings.lr)
        with folded(model, data.pixels(slice(0, 2))) as still:
            for step in range(settings.steps):
                with autocast(device):
                    margins = _margins(still, pictures, labels)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(-margins.sum(), inputs=[pictures])
                optimizer.step()
                with torch.no_grad():
                    pictures.clamp_(0, 1)
                done = number * settings.steps + step + 1
                progress("margins", done, len(parts) * settings.steps)
        found.append(margins.detach().view(len(part), 2, settings.starts).amax(2))
    noisy, natural = torch.cat(found).float().T.tolist()
    return Margins(tuple(noisy), tuple(natural))


def _margins(model: Classifier, pictures: Tensor, labels: Tensor) -> Tensor:
    logits = model(pictures).float()
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)
    margins: Tensor = (own - others).flatten()
    return margins
