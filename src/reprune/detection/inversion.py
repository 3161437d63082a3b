"""Trigger inversion: the smallest patch that sends clean images to a class (Neural Cleanse)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once
from reprune.detection.schedule import Schedule
from reprune.errors import ConfigurationError
from reprune.evaluation import flip_rate, predict
from reprune.folding import folded
from reprune.precision import autocast
from reprune.results import TriggerState
from reprune.types import Progress, silent

EMPTY = 0.1
"""A mask that sums to less, in pixels, is no trigger: the class is reached without one."""
SATURATED = 0.9
"""A mask that covers more, as a share of the picture, is no trigger but another picture."""
LOOK = 10
"""Steps between two looks at the device for classes that are done."""


@dataclass(frozen=True, kw_only=True)
class Inversion:
    r"""Settings of trigger inversion.

    The weight $\lambda_k$ of the mask's size is looked after once every `every` steps: after
    `patience` such checks in a row at which the flip rate held it is multiplied by `up`, after as
    many at which it did not it is divided by `down`. It stays within [1e-5, 1].

    Attributes:
        steps: optimiser steps at most.
        images: images a step, shared by all classes, drawn with replacement.
        lr: learning rate of Adam on the logits of mask and pattern; Adam's betas are 0.5 and 0.9.
        flip: share of the images of other classes that a trigger has to send to its class, in
            (0, 1].
        chunk: triggered images in one forward pass at most, fewer of large ones, but all of one
            class together; bounds memory.
        start: masks of "faint" are 0.12 everywhere, of "random" uniform in [0, 1].
        cost: the weight to begin with.
        delay: the weight is 0 until the flip rate held at `patience` checks in a row.
        every: steps between two checks; the flip rate is the mean over them.
        smoothing: share of the earlier checks in the flip rate, in [0, 1).
        patience: checks in a row that move the weight.
        up, down: factors on the weight, at least 1.
        settle: a class is done after so many checks without a smaller mask, once its weight has
            both risen and fallen; `None` runs all steps.
        shrink: a mask is smaller if it is below this share of the last one that was, in (0, 1].
    """

    steps: int = 200
    images: int = 16
    lr: float = 0.2
    flip: float = 0.95
    chunk: int = 512
    start: Literal["faint", "random"] = "faint"
    cost: float = 1e-3
    delay: bool = False
    every: int = 1
    smoothing: float = 0.8
    patience: int = 1
    up: float = 1.15
    down: float = 1.15
    settle: int | None = 40
    shrink: float = 0.99

    @classmethod
    def paper(cls) -> Inversion:
        """The settings of Wang et al. and of their released code.

        At most 1000 rounds of 31 batches of 32 images, Adam, a flip rate of 0.99, initial cost
        1e-3 after a start without cost, patience 5, multipliers 2 and 2**1.5, an end after 25
        rounds without a smaller mask. Their rate of 0.1 is on the argument of a hyperbolic tangent
        and is 0.2 on logits. Choices: images are drawn with replacement, those of the class itself
        do not count in its flip rate, and the weight is bounded.
        """
        return cls(
            steps=1000 * 31,
            flip=0.99,
            start="random",
            delay=True,
            every=31,
            smoothing=0.0,
            patience=5,
            up=2.0,
            down=2.0**1.5,
            settle=25,
            shrink=1.0,
        )

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        counts = ("steps", "images", "chunk", "every", "patience")
        for name in counts if self.settle is None else (*counts, "settle"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"{name} of an inversion must be at least 1, got {getattr(self, name)}"
                )
        for name in ("lr", "cost"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"{name} of an inversion must be positive, got {getattr(self, name)}"
                )
        for name in ("flip", "shrink"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(
                    f"{name} of an inversion must lie in (0, 1], got {getattr(self, name)}"
                )
        if not 0 <= self.smoothing < 1:
            raise ConfigurationError(f"smoothing must lie in [0, 1), got {self.smoothing}")
        if not min(self.up, self.down) >= 1:
            raise ConfigurationError(
                f"up and down must be at least 1, got {self.up} and {self.down}"
            )
        if self.start not in ("faint", "random"):
            raise ConfigurationError(f"start must be 'faint' or 'random', got {self.start!r}")

    def passes(self, images: int, classes: int) -> float:
        """Images through the network at most, over `images`, for all classes."""
        return self.steps * self.images * classes / images + classes + 1


@dataclass(frozen=True)
class Inverted:
    """Recovered triggers, one a class: `x -> (1 - mask) x + mask pattern`.

    Attributes:
        classes: the classes that were tried.
        masks: `(k, 1, h, w)` in [0, 1].
        patterns: `(k, c, h, w)` in [0, 1].
        sizes: sum of each mask in pixels; infinite where no trigger reached the flip rate, NaN
            where the loss went NaN or infinite.
        flips: share of the images of other classes that the trigger sends to the class, in [0, 1].
        states: how each search ended, see `TriggerState`; read off the sizes where not given.
    """

    classes: tuple[int, ...]
    masks: Tensor
    patterns: Tensor
    sizes: tuple[float, ...]
    flips: tuple[float, ...]
    states: tuple[TriggerState, ...] = ()

    def __post_init__(self) -> None:
        if not self.states:
            pixels = self.masks.shape[2] * self.masks.shape[3]
            states = tuple(_state(size, pixels) for size in self.sizes)
            object.__setattr__(self, "states", states)

    def place(self, label: int | None) -> int | None:
        """The index of a class whose trigger was found; `None` of others."""
        if label is None or label not in self.classes:
            return None
        index = self.classes.index(label)
        return index if self.states[index] == "found" else None

    def trigger(self, index: int) -> Stamp:
        """The trigger of `classes[index]` as a function on pixels."""
        return Stamp.patch(self.masks[index], self.patterns[index])


def invert(
    model: Classifier,
    data: ImageSet,
    classes: Sequence[int],
    settings: Inversion,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
    phase: str = "invert",
) -> Inverted:
    r"""For each class, the smallest mask and pattern that send clean images there.

    $$\min_{m, p} L(f((1 - m) \odot x + m \odot p), k) + \lambda_k \lVert m \rVert_1$$

    All classes are solved side by side. Each weight $\lambda_k$ rises while the flip rate holds
    and falls while it does not; the smallest mask at which it held is kept. A class that is done
    leaves the batch, which changes the others by no more than rounding.

    Source: Wang et al., "Neural Cleanse", S&P 2019, Section IV.

    Raises:
        ConfigurationError: no class, or settings out of their range.
    """
    found = smallest_masks(
        model, data, classes, settings, generator=generator, progress=progress, phase=phase
    )
    return _judged(model, data, found, settings.flip)


def smallest_masks(
    model: Classifier,
    data: ImageSet,
    classes: Sequence[int],
    settings: Inversion,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
    phase: str = "invert",
) -> Inverted:
    """The search of `invert` alone: flip rates are 0, and no state is "empty".

    Raises:
        ConfigurationError: no class, or settings out of their range.
    """
    settings.check()
    if not classes:
        raise ConfigurationError("inversion needs a class, got none")
    count, device = len(classes), data.device
    targets = torch.tensor(list(classes), device=device)
    masks, patterns = _begin(count, data, settings, generator)
    picks = torch.randint(len(data), (settings.steps, settings.images), generator=generator)
    picks = picks.to(device)
    optimizer = torch.optim.Adam([masks, patterns], lr=settings.lr, betas=(0.5, 0.9))
    schedule = Schedule(settings, count, device)
    best_mask, best_pattern = (p.detach().sigmoid().clone() for p in (masks, patterns))
    per_chunk = max(1, at_once(settings.chunk, data.shape) // settings.images)
    active = torch.arange(count, device=device)
    with folded(model, data.pixels(slice(0, 2))) as still:
        for step in range(settings.steps):
            images, labels = data.pixels(picks[step]), data.labels[picks[step]]
            optimizer.zero_grad(set_to_none=True)
            for part in torch.split(active, per_chunk):
                mask, pattern = masks[part].sigmoid(), patterns[part].sigmoid()
                x = images[None] * (1 - mask[:, None]) + (mask * pattern)[:, None]
                x = x.flatten(0, 1)
                wanted = targets[part].repeat_interleave(len(images))
                with autocast(device):
                    logits = still(x).float()
                loss = nn.functional.cross_entropy(logits, wanted, reduction="none")
                loss = loss.view(len(part), -1).mean(1)
                small = mask.flatten(1).sum(1)
                costs = schedule.weight[part] * small
                (loss + costs).sum().backward()  # type: ignore[no-untyped-call]
                hit = (logits.argmax(1) == wanted).view(len(part), -1)
                schedule.count(part, hit, labels[None] != targets[part, None], loss.detach())
            if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
                with torch.no_grad():
                    better = schedule.check(masks.sigmoid().flatten(1).sum(1))
                    chosen = better.view(-1, 1, 1, 1)
                    best_mask = torch.where(chosen, masks.sigmoid(), best_mask)
                    best_pattern = torch.where(chosen, patterns.sigmoid(), best_pattern)
            optimizer.step()
            progress(phase, step + 1, settings.steps)
            if (step + 1) % LOOK == 0 and bool(schedule.done[active].any()):
                active = (~schedule.done).nonzero().flatten()
                if not len(active):
                    break
    return Inverted(
        tuple(classes), best_mask, best_pattern, tuple(schedule.sizes()), (0.0,) * count
    )


def _begin(
    count: int, data: ImageSet, settings: Inversion, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits of masks `(k, 1, h, w)` and patterns `(k, c, h, w)` to begin with."""
    c, h, w = data.shape
    if settings.start == "faint":
        masks = torch.full((count, 1, h, w), -2.0)
        patterns = torch.randn((count, c, h, w), generator=generator)
    else:
        masks = torch.rand((count, 1, h, w), generator=generator).logit(1e-3)
        patterns = torch.rand((count, c, h, w), generator=generator).logit(1e-3)
    return masks.to(data.device).requires_grad_(True), patterns.to(data.device).requires_grad_(True)


def _judged(model: Classifier, data: ImageSet, found: Inverted, flip: float) -> Inverted:
    """With the flip rates, and "empty" where the class is reached without any trigger."""
    answers = predict(model, data).argmax(1)
    states, flips = list(found.states), [0.0] * len(found.classes)
    for i, k in enumerate(found.classes):
        if not math.isfinite(found.sizes[i]):
            continue
        flips[i] = flip_rate(model, data, found.trigger(i), k)
        others = data.labels != k
        if others.any() and float((answers[others] == k).float().mean()) >= flip:
            states[i] = "empty"
    return replace(found, flips=tuple(flips), states=tuple(states))


def _state(size: float, pixels: int) -> TriggerState:
    if math.isnan(size):
        return "broken"
    if math.isinf(size):
        return "never flips"
    if size < EMPTY:
        return "empty"
    return "saturated" if size > SATURATED * pixels else "found"
