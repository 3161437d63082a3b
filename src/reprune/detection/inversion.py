"""Trigger inversion: the smallest patch that sends clean images to a class (Neural Cleanse)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reprune.attacks import Stamp, triggered
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import predict
from reprune.training import autocast
from reprune.types import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Settings of trigger inversion.

    Attributes:
        steps: optimiser steps.
        images: images a step, shared by all classes.
        lr: learning rate of Adam on the logits of mask and pattern.
        flip: share of the images that a trigger has to send to its class, in (0, 1).
        chunk: triggered images in one forward pass at most; bounds memory.
    """

    steps: int = 100
    images: int = 32
    lr: float = 0.2
    flip: float = 0.95
    chunk: int = 512


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
    """

    classes: tuple[int, ...]
    masks: Tensor
    patterns: Tensor
    sizes: tuple[float, ...]
    flips: tuple[float, ...]

    def trigger(self, index: int) -> Stamp:
        """The trigger of `classes[index]` as a function on pixels."""
        mask = self.masks[index].expand_as(self.patterns[index])
        return Stamp(1 - mask, mask * self.patterns[index])


def invert(
    model: Classifier,
    data: ImageSet,
    classes: Sequence[int],
    settings: Inversion,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Inverted:
    r"""For each class, the smallest mask and pattern that send clean images there.

    $$\min_{m, p} L(f((1 - m) \odot x + m \odot p), k) + \lambda_k \lVert m \rVert_1$$

    All classes are solved side by side. Each weight $\lambda_k$ rises while the flip rate holds
    and falls while it does not; the smallest mask at which it held is kept.

    Source: Wang et al., "Neural Cleanse", S&P 2019, Section IV.

    Raises:
        ConfigurationError: no class, or settings that are not positive.
    """
    if not classes or min(settings.steps, settings.images, settings.chunk) < 1:
        raise ConfigurationError(f"inversion needs a class and positive settings, got {settings}")
    c, h, w = data.shape
    count, device = len(classes), data.device
    targets = torch.tensor(list(classes), device=device)
    mask_logits = torch.full((count, 1, h, w), -2.0, device=device)
    pattern_logits = torch.randn((count, c, h, w), generator=generator).to(device)
    parameters = [mask_logits.requires_grad_(True), pattern_logits.requires_grad_(True)]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.5, 0.9))
    weight = torch.full((count,), 1e-3, device=device)
    running = torch.zeros(count, device=device)
    best_size = torch.full((count,), float("inf"), device=device)
    broken = torch.zeros(count, dtype=torch.bool, device=device)
    best_mask, best_pattern = (p.detach().sigmoid().clone() for p in parameters)
    per_chunk = max(1, settings.chunk // settings.images)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with model.evaluating():
            for step in range(settings.steps):
                pick = torch.randint(len(data), (settings.images,), generator=generator)
                images = data.pixels(pick.to(device))
                other = data.labels[pick.to(device)][None] != targets[:, None]
                optimizer.zero_grad(set_to_none=True)
                flips, losses = [], []
                for part in torch.split(torch.arange(count, device=device), per_chunk):
                    mask, pattern = mask_logits[part].sigmoid(), pattern_logits[part].sigmoid()
                    x = images[None] * (1 - mask[:, None]) + (mask * pattern)[:, None]
                    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                    wanted = targets[part].repeat_interleave(len(images))
                    with autocast(device):
                        logits = model(x).float()
                    loss = nn.functional.cross_entropy(logits, wanted, reduction="none")
                    loss = loss.view(len(part), -1).mean(1)
                    losses.append(loss.detach())
                    small = mask.flatten(1).sum(1)
                    (loss + weight[part] * small).sum().backward()  # type: ignore[no-untyped-call]
                    hit = (logits.argmax(1) == wanted).view(len(part), -1)
                    use = other[part]
                    flips.append((hit & use).sum(1) / use.sum(1).clamp_min(1))
                with torch.no_grad():
                    flip = torch.cat(flips)
                    broken |= ~torch.cat(losses).isfinite()
                    momentum = 0.8 if step else 0.0
                    running = momentum * running + (1 - momentum) * flip
                    size = mask_logits.sigmoid().flatten(1).sum(1)
                    better = (running >= settings.flip) & (size < best_size)
                    best_size = torch.where(better, size, best_size)
                    chosen = better.view(-1, 1, 1, 1)
                    best_mask = torch.where(chosen, mask_logits.sigmoid(), best_mask)
                    best_pattern = torch.where(chosen, pattern_logits.sigmoid(), best_pattern)
                    up = running >= settings.flip
                    weight = torch.where(up, weight * 1.15, weight / 1.15).clamp(1e-5, 1.0)
                optimizer.step()
                progress("invert", step + 1, settings.steps)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    sizes = best_size.masked_fill(broken, float("nan")).tolist()
    found = Inverted(tuple(classes), best_mask, best_pattern, tuple(sizes), (0.0,) * count)
    rates = [_flip(model, data, found, k) if math.isfinite(sizes[k]) else 0.0 for k in range(count)]
    return replace(found, flips=tuple(rates))


def _flip(model: Classifier, data: ImageSet, found: Inverted, index: int) -> float:
    """Share of the images of other classes that the final trigger sends to its class."""
    attacked = triggered(data, found.trigger(index), found.classes[index])
    if not len(attacked):
        return 0.0
    return float((predict(model, attacked).argmax(1) == found.classes[index]).float().mean())
