"""Spectral signatures: poisoned images lie far out along a class's main direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Need
from reprune.detection.activations import TRACED, by_class, penultimate, principal
from reprune.detection.filtering import Filter, Filtered
from reprune.errors import ConfigurationError
from reprune.results import Trace
from reprune.types import Progress

FEWEST = 3
"""Images of a class below which its features have no direction to speak of."""


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Filter):
    r"""Of each class, flag the images that lie farthest out along its features' main direction.

    $$s(x) = \langle \phi(x) - \bar\phi_y, v_y \rangle^2$$

    with $\phi$ the penultimate features, $\bar\phi_y$ their mean over the images labelled $y$ and
    $v_y$ the first right singular vector of the centred features of that class. The share
    `factor * rate` with the highest scores is flagged in every class, whether there are poisoned
    images or not: that there are any is not what this method says.

    Source: Tran et al., "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, Algorithm 1.

    Choices: features are averaged over map positions or tokens where the last layer reads such;
    classes of fewer than 3 images are not decided, and so flagged.

    Attributes:
        rate: expected share of poisoned images in a class, at most; in (0, 1).
        factor: how many times that share is flagged; `factor * rate` is at most 1.
    """

    title: ClassVar[str] = "Spectral signatures"
    source_paper: ClassVar[str] = "Tran et al., NeurIPS 2018"
    needs: ClassVar[tuple[Need, ...]] = ("training data",)
    scale: ClassVar[str] = "squared distance from the class mean along its main direction"

    rate: float = 0.05
    factor: float = 1.5

    @classmethod
    def paper(cls) -> SpectralSignatures:
        """1.5 times 5 %, the lower of the paper's two poisoning rates (Section 4)."""
        return cls()

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        if not 0 < self.rate < 1:
            raise ConfigurationError(f"rate must lie in (0, 1), got {self.rate}")
        if not 0 < self.factor * self.rate <= 1:
            raise ConfigurationError(
                f"factor * rate must lie in (0, 1], got {self.factor} * {self.rate}"
            )

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
        with clock("directions"):
            for _, rows in by_class(features, images.labels):
                if len(rows) < FEWEST:
                    continue
                centred = features[rows].double()
                centred -= centred.mean(0)
                direction, _ = principal(centred, 1)
                found = (centred @ direction[:, 0]).square().float()
                scores[rows], flagged[rows] = found, False
                count = round(self.factor * self.rate * len(rows))
                flagged[rows[found.argsort(descending=True, stable=True)[:count]]] = True
        reasons = [
            f"{int(flagged.sum())} of {len(images)} images flagged: of every class the "
            f"{self.factor * self.rate:.1%} that lie farthest out"
        ]
        undecided = int(scores.isnan().sum())
        if undecided:
            reasons.append(f"{undecided} images could not be decided and are flagged")
        return Filtered(
            scores,
            flagged,
            None,
            tuple(reasons),
            trace=Trace(seconds=clock.seconds),
        )
