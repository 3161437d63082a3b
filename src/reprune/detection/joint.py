"""Joint inversion: triggers that work in a model and in its unlearned copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once
from reprune.detection.families import FAMILIES, FamilyName
from reprune.detection.inversion import Inversion
from reprune.detection.schedule import Schedule
from reprune.errors import ConfigurationError
from reprune.evaluation import ELSEWHERE
from reprune.folding import folded
from reprune.precision import autocast
from reprune.types import Progress, Trigger, silent

FARTHEST = 20.0
"""Nothing counts as more than this many times ahead of the next class."""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Settings of a joint inversion.

    Attributes:
        steps: optimiser steps.
        images: images a step, shared by all classes, drawn with replacement.
        flip: share of the images of other classes that a trigger has to send to its class in the
            model, in (0, 1].
        weight: of the loss in the unlearned copy, beside 1 for the model.
        chunk: triggered images in one forward pass at most, fewer of large ones, but all of one
            class together; bounds memory.
    """

    steps: int = 80
    images: int = 16
    flip: float = 0.9
    weight: float = 3.0
    chunk: int = 480

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("steps", "images", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.flip <= 1:
            raise ConfigurationError(f"flip must lie in (0, 1], got {self.flip}")
        if not 0 <= self.weight < math.inf:
            raise ConfigurationError(f"weight must not be negative, got {self.weight}")

    def passes(self, images: int, classes: int) -> float:
        """Images through networks at most, over `images`, for all classes."""
        networks = 2 if self.weight else 1
        return networks * self.steps * self.images * classes / images


def check_families(names: Sequence[str]) -> None:
    """Raises `ConfigurationError` unless these are names of `FAMILIES`, at least one."""
    if not names or any(name not in FAMILIES for name in names):
        raise ConfigurationError(f"families must be some of {', '.join(FAMILIES)}, got {names}")


@dataclass(frozen=True)
class Recovered:
    """Triggers of one family, one a class.

    Attributes:
        classes: the classes that were tried.
        triggers: functions on pixels.
        sizes: in the family's unit; infinite where no trigger reached the flip rate, NaN where
            the loss broke.
    """

    classes: tuple[int, ...]
    triggers: tuple[Trigger, ...]
    sizes: tuple[float, ...]


def invert_jointly(
    model: Classifier,
    exposed: Sequence[Classifier],
    data: ImageSet,
    classes: Sequence[int],
    family: FamilyName,
    settings: Joint,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
    phase: str = "invert jointly",
) -> Recovered:
    r"""For each class, the smallest trigger that sends clean images there in both models.

    $$\min_t L(f(t(x)), k) + w L(\hat f(t(x)), k) + \lambda_k |t|$$

    $\hat f$ is the model unlearned on clean images: what pictures of class k have is of no use
    there any more, what the attacker planted is. A trigger that needs both cannot be built of
    natural features of the class alone. The weight $\lambda_k$ rises while the flip rate in the
    model holds and falls while it does not, as in `invert`; the smallest trigger at which it held
    is kept, or the last one where it never held.

    Source: this package; inversion after Wang et al., "Neural Cleanse", S&P 2019, the unlearned
    model after Li et al., ICML 2023, Appendix D.

    Args:
        model, exposed: the classifier and its unlearned copies, of which each step takes the
            next; none is changed.
        data: clean labelled images.
        classes: classes to search; `ELSEWHERE` stands for triggers that lead each image to any
            class but its own.
        family: a name of `FAMILIES`.
        phase: name given to `progress`.

    Raises:
        ConfigurationError: no class, or settings out of their range.
    """
    settings.check()
    if not classes or not exposed:
        raise ConfigurationError("a joint inversion needs a class and an unlearned copy")
    count, device = len(classes), data.device
    targets = torch.tensor(list(classes), device=device)
    kind = FAMILIES[family]
    found = kind(count, data.shape, generator)
    found.parameters = [p.detach().to(device).requires_grad_(True) for p in found.parameters]
    picks = torch.randint(len(data), (settings.steps, settings.images), generator=generator)
    picks = picks.to(device)
    optimizer = torch.optim.Adam(found.parameters, lr=kind.lr, betas=(0.5, 0.9))
    schedule = Schedule(Inversion(flip=settings.flip, cost=kind.cost, settle=None), count, device)
    best = [p.detach().clone() for p in found.parameters]
    held = torch.zeros(count, dtype=torch.bool, device=device)
    together = max(1, at_once(settings.chunk, data.shape) // settings.images)
    few = data.pixels(slice(0, 2))
    with ExitStack() as stack:
        used = (model, *(exposed if settings.weight else ()))
        still, *copies = [stack.enter_context(folded(one, few)) for one in used]
        for step in range(settings.steps):
            images, labels = data.pixels(picks[step]), data.labels[picks[step]]
            optimizer.zero_grad(set_to_none=True)
            sizes = torch.zeros(count, device=device)
            for part in torch.split(torch.arange(count, device=device), together):
                pictures, size = found.apply(images, part)
                others = labels[None] != targets[part, None]
                networks = [(still, 1.0)]
                if settings.weight:
                    networks.append((copies[step % len(copies)], settings.weight))
                loss, hit = _losses(networks, pictures, targets[part], labels, others)
                (loss + schedule.weight[part] * size).sum().backward()  # type: ignore[no-untyped-call]
                schedule.count(part, hit, others, loss.detach())
                sizes[part] = size.detach()
            before = [p.detach().clone() for p in found.parameters]
            better = schedule.check(sizes)
            held |= better
            for kept, now in zip(best, before, strict=True):
                chosen = (better | ~held).view(-1, *[1] * (now.dim() - 1))
                kept.copy_(torch.where(chosen, now, kept))
            optimizer.step()
            progress(phase, step + 1, settings.steps)
    values = [p.cpu() for p in best]
    triggers = tuple(found.trigger(values, i) for i in range(count))
    return Recovered(tuple(classes), triggers, tuple(schedule.sizes()))


def _losses(
    networks: Sequence[tuple[Classifier, float]],
    pictures: Tensor,
    targets: Tensor,
    labels: Tensor,
    others: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss by class over the images of other classes, and which of them the first network sends."""
    x = pictures.flatten(0, 1)
    wanted = targets[:, None].expand(others.shape).flatten()
    own = labels.expand(others.shape).flatten()
    loss, answers = torch.zeros(len(x), device=x.device), []
    for network, weight in networks:
        with autocast(x.device):
            logits = network(x).float()
        loss = loss + weight * _loss(logits, wanted, own)
        answers.append(logits.argmax(1))
    hit = torch.where(wanted == ELSEWHERE, answers[0] != own, answers[0] == wanted)
    counted = (loss.view(others.shape) * others).sum(1) / others.sum(1).clamp_min(1)
    return counted, hit.view(others.shape)


def _loss(logits: Tensor, wanted: Tensor, own: Tensor) -> Tensor:
    """Negative log-probability of the class that is wanted, or of all but the image's own."""
    anywhere = wanted == ELSEWHERE
    there = nn.functional.cross_entropy(
        logits, torch.where(anywhere, own, wanted), reduction="none"
    )
    others = logits.scatter(1, own[:, None], -math.inf)
    return torch.where(anywhere, logits.logsumexp(1) - others.logsumexp(1), there)


@dataclass(frozen=True)
class Favourite:
    """The class that a joint inversion and the unlearned copies agree on most.

    Attributes:
        label: the class with the smallest joint trigger.
        size: of that trigger.
        gap: natural logarithm of the next class's size over `size`; 0 where none was found.
        share: of the clean images that each of the copies sends there, at least, in [0, 1]; times
            the share of all copies that these are.
    """

    label: int
    size: float
    gap: float
    share: float

    @property
    def strength(self) -> float:
        """`gap * share`: high only where both say so."""
        return self.gap * self.share


def favourite(
    found: Recovered, histograms: Sequence[Sequence[int]], copies: int | None = None
) -> Favourite:
    """What joint triggers and the predictions of the copies say together.

    A clean model collapses to some class when it is unlearned, too, but to another one each time,
    and natural triggers for that class are not much smaller than for the next.

    Args:
        found: joint triggers of at least two classes.
        histograms: of the clean images, how often each copy predicts each class.
        copies: how many there were, of which these agree; all by default.
    """
    order = sorted(range(len(found.sizes)), key=lambda i: _known(found.sizes[i]))
    first, second = (_known(found.sizes[i]) for i in order[:2])
    label = found.classes[order[0]]
    gap = math.log(min(second / max(first, 1e-6), FARTHEST)) if math.isfinite(first) else 0.0
    share = min(counts[label] / max(1, sum(counts)) for counts in histograms)
    share *= len(histograms) / (copies or len(histograms))
    return Favourite(label, first, gap, share)


def _known(size: float) -> float:
    return math.inf if math.isnan(size) else size
