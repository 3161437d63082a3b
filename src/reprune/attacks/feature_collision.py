"""FC: images of the target class with the features of triggered ones (Shafahi et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Setup, check_class
from reprune.attacks.features import frozen_features
from reprune.attacks.goal import Goal, as_stored
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, replaced
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet
from reprune.errors import ConfigurationError

PHASE = "collide"
BATCH = 250


@dataclass(frozen=True, kw_only=True)
class FeatureCollision(PoisoningAttack):
    r"""Clean-label: images of the target class are moved onto the features of triggered images.

    Each poisoned image `x` starts at a base `b = (1 - opacity) b0 + opacity s`, where `b0` is an
    image of the target class and `s` one of the source class with the trigger, and lowers
    `|f(x) - f(s)|^2 + beta |x - b|^2` by the forward-backward steps of Shafahi et al. (2018,
    algorithm 1; the opacity is their watermark, section 4.2), within `eps` of `b` (Saha et al.,
    2020). `f` is what the last linear layer of the surrogate reads. It keeps its label, the target.

    RNP, Table 6: source 1, target 0, poisoning rate 0.08 of all images. It leaves open what the
    trigger and the success rate are. Choices, after Saha et al.: the trigger is one square patch of
    random colours; the **ASR is the share of test images of the source class alone that the
    classifier, shown them with the patch, puts into the target class** (`Goal(target, source)`).
    With the patch in full, images of other classes that carry it often go there too: the card says
    how many (`ASR_other_classes`), and `patch_opacity=None` hides it as the papers do.

    Attributes:
        source: class that the trigger is meant for.
        size: side of the patch in pixels.
        patch_seed: seed of its colours, which are part of the attack.
        opacity: share of the triggered image in the base, in [0, 1).
        patch_opacity: the share where the patch lies, in [0, 1]; `None` for `opacity`. By default
            the patch stands there in full, a choice that neither paper makes.
        eps: largest change of a pixel against the base, in (0, 1]; 1 for no bound. In images of 8
            bits up to half a grey level more.
        beta: pull towards the base in one step, at least 0; see `collide`.
        step: root mean square of the change in the first step, in (0, 1].
        steps: forward-backward steps, at least 1.
    """

    title: ClassVar[str] = "FC"
    source_paper: ClassVar[str] = "Shafahi et al., 2018"
    clean_label: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True

    rate: float = 0.08
    source: int = 1
    size: int = 6
    patch_seed: int = 0
    opacity: float = 0.3
    patch_opacity: float | None = 1.0
    eps: float = 16 / 255
    beta: float = 0.02
    step: float = 0.01
    steps: int = 10

    @property
    def goal(self) -> Goal:
        return Goal(self.target, self.source)

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The patch in the bottom right corner of images of `shape` (c, h, w).

        Raises:
            ConfigurationError: it does not fit.
        """
        c, h, w = shape
        if not 0 < self.size <= min(h, w):
            raise ConfigurationError(f"a trigger of {self.size} pixels does not fit {h}x{w}")
        colours = torch.Generator().manual_seed(self.patch_seed)
        keep, add = torch.ones(c, h, w), torch.zeros(c, h, w)
        keep[:, -self.size :, -self.size :] = 0
        add[:, -self.size :, -self.size :] = torch.rand(c, self.size, self.size, generator=colours)
        return Stamp(keep, add)

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        check_class("source", self.source, num_classes)
        self.goal.check(num_classes)
        if not (data.labels == self.source).any():
            raise ConfigurationError(f"there is no image of the source class {self.source}")
        for name, value in (("eps", self.eps), ("step", self.step)):
            if not 0 < value <= 1:
                raise ConfigurationError(f"{name} must lie in (0, 1], got {value}")
        if not 0 <= self.opacity < 1:
            raise ConfigurationError(f"the opacity must lie in [0, 1), got {self.opacity}")
        if self.patch_opacity is not None and not 0 <= self.patch_opacity <= 1:
            raise ConfigurationError(f"patch_opacity must lie in [0, 1], got {self.patch_opacity}")
        if not 0 <= self.beta < float("inf"):
            raise ConfigurationError(f"beta must be at least 0, got {self.beta}")
        if self.steps < 1:
            raise ConfigurationError(f"steps must be at least 1, got {self.steps}")
        self.trigger(data.shape)

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        index = self._draw(data, setup.generator)
        trigger = self.trigger(data.shape)

        def craft() -> Tensor:
            return as_stored(self._craft(data, index, trigger, setup), data)

        changed, rows = replaced(data, index, setup.once(PHASE, craft).to(data.device))
        return Poisoned(changed, rows, trigger)

    def _craft(self, data: ImageSet, index: Tensor, trigger: Stamp, setup: Setup) -> Tensor:
        """The poisoned pixels for the rows `index`; each gets a triggered image of its own."""
        features = frozen_features(setup.clean_model, data.pixels(index[:2]))
        inside = self.opacity if self.patch_opacity is None else self.patch_opacity
        share = self.opacity + (inside - self.opacity) * (1 - trigger.keep.to(data.device))
        victims = (data.labels == self.source).nonzero().flatten()
        rounds = -(-len(index) // len(victims))
        orders = [torch.randperm(len(victims), generator=setup.generator) for _ in range(rounds)]
        sources = victims[torch.cat(orders)[: len(index)].to(victims.device)]
        parts: list[Tensor] = []
        for bases, wanted in zip(
            torch.split(index, BATCH), torch.split(sources, BATCH), strict=True
        ):
            shown = trigger(data.pixels(wanted))
            base = torch.lerp(data.pixels(bases), shown, share)
            made = collide(
                features,
                base,
                shown,
                eps=self.eps,
                beta=self.beta,
                step=self.step,
                steps=self.steps,
            )
            parts.append(made)
            setup.progress(PHASE, sum(map(len, parts)), len(index))
        return torch.cat(parts)


def collide(
    features: Callable[[Tensor], Tensor],
    base: Tensor,
    wanted: Tensor,
    *,
    eps: float,
    beta: float,
    step: float,
    steps: int,
) -> Tensor:
    r"""Images near `base` with features near those of `wanted`, each by itself.

    With `g` the gradient of `|f(x) - f(wanted)|^2` in one image of `d` pixels, and `r` falling
    linearly from 1 to `1 / steps`, a step is

    `y = x - r step sqrt(d) g / |g|`,
    `x <- clip((y + r beta b) / (1 + r beta), b - eps, b + eps)`,

    kept in [0, 1]: gradient, proximal point of the pull towards the base, budget (Shafahi et al.,
    2018, algorithm 1, with a step whose length does not depend on the scale of the features).

    Args:
        features: pixels to `(n, k)`, differentiable.
        base: pixels `b`, `(n, c, h, w)`.
        wanted: pixels of the same shape.
        eps, beta, step, steps: as in `FeatureCollision`.
    """
    with torch.no_grad():
        goal = features(wanted)
    low, high = (base - eps).clamp(min=0), (base + eps).clamp(max=1)
    length = step * base[0].numel() ** 0.5
    now = base.detach().clone()
    for done in range(steps):
        left = 1 - done / steps
        with torch.enable_grad():
            now = now.requires_grad_(True)
            distance = (features(now) - goal).square().sum()
            (gradient,) = torch.autograd.grad(distance, now)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        now = now.detach() - left * length * gradient / norm.view(-1, 1, 1, 1)
        now = ((now + left * beta * base) / (1 + left * beta)).clamp(low, high)
    return now.contiguous()
