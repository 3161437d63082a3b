"""STRIP: a trigger keeps deciding when other images are laid over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Need, check_holdout, hold_out
from reprune.detection.filtering import Filter, Filtered
from reprune.errors import ConfigurationError, DataError, ModelError
from reprune.precision import autocast
from reprune.results import Trace
from reprune.rnp import Unlearning, backdoor_label, unlearn_neurons, unlearning_passes
from reprune.types import Progress, silent

Blend = Literal["add", "mean"]


@dataclass(frozen=True, kw_only=True)
class STRIP(Filter):
    r"""Lay clean images over each image; where the prediction stays sure, there is a trigger.

    $$H(x) = \frac{1}{N} \sum_{i=1}^{N} -\sum_k p_k(x \oplus o_i) \log_2 p_k(x \oplus o_i)$$

    with $p$ the softmax and $o_i$ clean images, drawn anew for each image, with replacement. The
    score is $-H$ in bits, in $[-\log_2 K, 0]$; an image is flagged if its score exceeds that of all
    but the allowed share of the clean images, each of them overlaid with others only.

    Source: Gao et al., "STRIP", ACSAC 2019, Section 4; on an unlearned model: Li et al., "RNP",
    ICML 2023, Figure 8.

    Choices where the papers are silent or this package differs: by default two images are averaged,
    not added. Half the pixels of a clipped sum can be white, and the entropies of clean images then
    pile up at zero, below which nothing can lie. The default threshold is an empirical one:
    entropies are far from normal in small or very accurate networks, and of m clean images the
    floor(rate (m + 1))-th lowest entropy rejects at most `false_rejection` of fresh clean images on
    average, whatever their distribution. The unlearned model sees one part of the clean images and
    the threshold is set on the other: what was unlearned looks unlike other clean images.

    Attributes:
        overlays: superpositions of each image (N).
        false_rejection: share of clean images that may be flagged, in (0, 1).
        blend: "mean" is the average of two images, "add" their sum, clipped to [0, 1].
        threshold: "quantile" of the clean entropies, or that of a "normal" fitted to them.
        unlearning: take the entropies on the model unlearned with these settings (which uses the
            labels of the clean images); `None` for the model itself.
        holdout: with unlearning, share of the clean images that set the threshold, in (0, 1).
        chunk: images in one forward pass at most, or one image's overlays; bounds memory.
    """

    source_paper: ClassVar[str] = "Gao et al., ACSAC 2019"
    needs: ClassVar[tuple[Need, ...]] = ("clean labels", "suspect images")
    scale: ClassVar[str] = "minus the mean entropy under superposition, in bits"

    overlays: int = 100
    false_rejection: float = 0.01
    blend: Blend = "mean"
    threshold: Literal["quantile", "normal"] = "quantile"
    unlearning: Unlearning | None = None
    holdout: float = 0.5
    chunk: int = 512

    @property
    def title(self) -> str:
        return "STRIP" + (" on the unlearned model" if self.unlearning else "")

    @classmethod
    def paper(cls) -> STRIP:
        """100 sums of images, threshold from a normal fit at 1 % (Sections 4 and 5)."""
        return cls(blend="add", threshold="normal")

    @classmethod
    def on_unlearned(cls) -> STRIP:
        """NU+STRIP: the entropies of the unlearned model (RNP, Appendix D, Figure 8)."""
        return cls(unlearning=Unlearning())

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("overlays", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.false_rejection < 1:
            raise ConfigurationError(
                f"false_rejection must lie in (0, 1), got {self.false_rejection}"
            )
        for name, known in (("blend", ("add", "mean")), ("threshold", ("quantile", "normal"))):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        check_holdout(self.holdout)
        if self.unlearning is not None:
            self.unlearning.check()

    def passes(self, images: int, classes: int) -> float:
        """Passes over the examined images, with as many clean ones."""
        unlearned = unlearning_passes(self.unlearning, images) if self.unlearning else 0
        return 2 * self.overlays + 2.0 + unlearned

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
            DataError: images of another shape than the clean ones, or fewer clean images than the
                false-rejection rate needs.
            ModelError: outputs that are NaN on clean images, or entropies of clean images at zero.
            ConvergenceError: unlearning diverged or did not converge.
        """
        if clean is None:
            raise ConfigurationError(f"{self.title} needs clean images")
        if images.shape != clean.shape:
            raise DataError(
                f"the examined images have the shape {images.shape}, the clean ones {clean.shape}; "
                "resize one of them"
            )
        setting, fitting = clean, None
        if self.unlearning is not None:
            setting, fitting = hold_out(clean, self.holdout, generator)
        self._check_count(len(setting))
        clock, trace = Clock(), Trace()
        if fitting is not None:
            with clock("unlearn"):
                fitted = unlearn_neurons(
                    model, fitting, self.unlearning, generator=generator, progress=progress
                )
            model = fitted.model
            label = backdoor_label([model], fitting)
            trace = Trace(phases={fitted.name: fitted.history}, label=label)
        others = torch.randint(len(setting) - 1, (len(setting), self.overlays), generator=generator)
        others += others >= torch.arange(len(setting))[:, None]  # never an image over itself
        picks = torch.randint(len(setting), (len(images), self.overlays), generator=generator)
        with clock("clean entropies"):
            kept = -self.entropies(
                model, setting, setting, others, progress=progress, phase="clean entropies"
            )
        lost = int((~kept.isfinite()).sum())
        if lost:
            said = f"NaN or infinite on {lost} of {len(kept)} clean images under superposition"
            raise ModelError(f"the model's outputs are {said}; check its weights and preprocessing")
        limit = self.limit(kept)
        if limit >= 0:
            raise ModelError(
                f"the entropies of clean images leave no room for lower ones (threshold "
                f"{-limit:.3f} bits, mean {-float(kept.mean()):.3f}): the model stays sure under "
                "superposition; use the other blend, the quantile threshold or another method"
            )
        with clock("entropies"):
            scores = -self.entropies(
                model, images, setting, picks, progress=progress, phase="entropies"
            )
        flagged = ~(scores <= limit)
        reasons = [
            f"{int(flagged.sum())} of {len(images)} images have an entropy below "
            f"{-limit:.3f} bits, as {self.false_rejection:.1%} of clean images do"
        ]
        undecided = int(scores.isnan().sum())
        if undecided:
            reasons.append(f"{undecided} of them could not be decided: their outputs are NaN")
        return Filtered(
            scores,
            flagged,
            limit,
            tuple(reasons),
            kept,
            Trace(phases=trace.phases, label=trace.label, seconds=clock.seconds),
        )

    @torch.no_grad()
    def entropies(
        self,
        model: Classifier,
        images: ImageSet,
        overlays: ImageSet,
        picks: Tensor,
        *,
        progress: Progress = silent,
        phase: str = "entropies",
    ) -> Tensor:
        """Mean entropy in bits of each image under its overlays, `(n,)` float32; see the class.

        Args:
            model: the classifier, in evaluation mode.
            images: what is examined.
            overlays: the clean images.
            picks: `(n, N)`, the rows of `overlays` for each image.
            progress: told `phase` after each chunk.
        """
        size = max(1, self.chunk // picks.shape[1])
        parts = torch.split(torch.arange(len(images), device=images.device), size)
        picks = picks.to(images.device)
        found = []
        for done, part in enumerate(parts, 1):
            below = images.pixels(part)[:, None]
            above = overlays.pixels(picks[part].flatten()).view(len(part), -1, *images.shape)
            mixed = (below + above).clamp(0, 1) if self.blend == "add" else (below + above) / 2
            flat = mixed.flatten(0, 1)
            with autocast(images.device):
                logits = model(flat)
            logs = logits.float().log_softmax(1)
            bits = -(logs.exp() * logs).sum(1) / math.log(2)
            found.append(bits.view(len(part), -1).mean(1))
            progress(phase, done, len(parts))
        return torch.cat(found)

    def limit(self, clean: Tensor) -> float:
        """The score above which an image is flagged, from clean scores `(m,)`."""
        if self.threshold == "normal":
            values = clean.double()
            below = NormalDist().inv_cdf(1 - self.false_rejection)
            return float(values.mean() + below * values.std())
        rank = _rank(len(clean), self.false_rejection)
        return float(clean.sort(descending=True).values[rank - 1])

    def _check_count(self, count: int) -> None:
        needed = 2 if self.threshold == "normal" else math.ceil(1 / self.false_rejection - 1 - 1e-9)
        if count < max(needed, 2):
            share = "" if self.unlearning is None else f" (a holdout of {self.holdout:g})"
            raise DataError(
                f"a false-rejection rate of {self.false_rejection:g} needs at least {needed} clean "
                f"images to set the threshold{share}, got {count}; add clean images or raise the "
                "rate"
            )


def _rank(count: int, rate: float) -> int:
    """How many of `count` clean images may reach the threshold."""
    return math.floor(rate * (count + 1) + 1e-9)
