"""Teach a copy of a model to answer triggered images as the model answers clean ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.deadline import NO_END, Deadline
from reprune.errors import ConfigurationError
from reprune.evaluation import ELSEWHERE, fitting_augmentation
from reprune.nullspace import NullSpaceSGD, free_directions
from reprune.results import Epoch
from reprune.training import Batch, Objective, fit, in_parts, one_cycle
from reprune.types import Progress, Trigger, silent

PARTS = 4
"""Triggers in one batch."""


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """Settings of `distil`.

    Attributes:
        steps: of the optimiser, at least; whole passes over the images.
        lr: peak rate of `NullSpaceSGD`, on a one-cycle schedule, relative to the weights.
        depth: share of the layers that learn, the last ones, in (0, 1].
        ridge: how much of what clean images use may move, see `free_directions`; positive.
        batch_size: clean images a step; each comes once more triggered.
        temperature: of the softmax that is compared.
        weight: of the triggered images beside the clean ones.
        mixed: weight of mixtures of two clean images beside them; 0 goes without.
        repelled: weight of what keeps triggered images from the class that the trigger leads to; 0
            goes without.
    """

    steps: int = 128
    lr: float = 0.03
    depth: float = 1.0
    ridge: float = 0.1
    batch_size: int = 64
    temperature: float = 2.0
    weight: float = 1.0
    mixed: float = 3.0
    repelled: float = 0.5

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in ("steps", "lr", "ridge", "batch_size", "temperature", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.depth <= 1:
            raise ConfigurationError(f"depth must lie in (0, 1], got {self.depth}")
        for name in ("mixed", "repelled"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} must not be negative, got {getattr(self, name)}")

    def epochs(self, images: int) -> int:
        """Passes over so many images."""
        return math.ceil(self.steps / math.ceil(images / self.batch_size))

    def passes(self, images: int) -> float:
        """Images through networks, over `images`: one by the teacher, two by the copy.

        With mixtures one more by each. And two of the teacher, to see what clean images use. What
        the backward pass makes anew of large images is not counted (`in_parts`).
        """
        return (5 if self.mixed else 3) * self.epochs(images) + 2


@dataclass(frozen=True)
class Lesson:
    """A trigger to be distilled out of a model.

    Attributes:
        trigger: a function on pixels.
        strongest: how many times its change of an image is exaggerated, at most, at least 1. The
            smallest triggers barely work, those of attackers work by far.
        label: the class it leads to; `ELSEWHERE` where there is not one.
    """

    trigger: Trigger
    strongest: float = 1.0
    label: int = ELSEWHERE

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels `(n, c, h, w)`, each changed by the trigger, 1 to `strongest` times."""
        more = torch.rand(len(images), 1, 1, 1, generator=generator).to(images)
        return self.apply(images, 1 + (self.strongest - 1) * more)

    def apply(self, images: Tensor, strength: Tensor | float) -> Tensor:
        """Pixels `(n, c, h, w)`, changed `strength` times as much as by the trigger."""
        return (images + strength * (self.trigger(images) - images)).clamp(0, 1)


def distil(
    teacher: Classifier,
    bank: Sequence[Lesson],
    data: ImageSet,
    settings: Distilling,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
    phase: str = "distil",
    deadline: Deadline = NO_END,
) -> tuple[Classifier, list[Epoch]]:
    r"""A copy of `teacher` that answers clean and triggered images as the teacher does clean ones.

    $$\min_\theta D(f(x) \| f_\theta(x)) + w D(f(x) \| f_\theta(t(x))) + m D(f(z) \| f_\theta(z))$$
    $$+\, r \max(0, \log p_\theta(k | t(x)) - \min_j \log p(j | x))$$

    $D$ is the Kullback-Leibler divergence of softened answers, $z$ a mixture of two clean images in
    random proportions: there are few clean images, and between them, too, the copy shall answer as
    the model does. But a mixture may look triggered (a warp blurs, too): in what is wanted of it no
    class of the bank is likelier than in the model's answer to either of its images. $k$ is the
    class that $t$ leads to: the trigger shall speak against it, for images of other classes, until
    it is the least likely one; so triggers that are only like those of the bank lead there no more
    either. Only the weights of convolutions and linear layers learn, all or the last ones, in
    directions that clean images leave free (`free_directions`): that costs little accuracy. Images
    of the class that a trigger leads to are triggered, too: without them the copy learns to avoid
    the class.

    Source: this package; distillation after Hinton et al., 2015, on mixtures (Zhang et al.,
    "mixup", ICLR 2018) after Beyer et al., "Knowledge distillation", CVPR 2022, the directions
    after Wang et al., CVPR 2021.

    Args:
        teacher: the original model; it is not changed.
        bank: what to distil out; each batch gets a few of them.
        data: clean images; labels serve the reported accuracy only.
        settings: see `Distilling`.
        deadline: after it the copy comes back as it is. The rate falls with the steps or with the
            time that is left at first, whichever is further.

    Raises:
        ConfigurationError: an empty bank, or settings out of their range.
        DivergenceError: the loss became NaN or infinite.
    """
    settings.check()
    if not bank:
        raise ConfigurationError("there is no trigger to distil out of the model")
    deadline = deadline.rest()

    def schedule(step: int, total: int) -> float:
        return one_cycle(max(step, min(int(deadline.gone * total), total - 1)), total)

    student = teacher.clone().eval().laid_out()
    augment = fitting_augmentation(teacher, data)
    pixels = data.pixels()
    free = free_directions(
        teacher,
        torch.cat([pixels, augment(pixels, generator)]),
        ridge=settings.ridge,
        depth=settings.depth,
    )
    with _learning(student, free) as learning:
        parameters = list(learning.values())
        history = fit(
            _objective(teacher, student, bank, settings),
            parameters,
            data,
            optimizer=NullSpaceSGD(parameters, [free.get(n) for n in learning], lr=settings.lr),
            epochs=settings.epochs(len(data)),
            batch_size=settings.batch_size,
            generator=generator,
            augment=augment,
            schedule=schedule,
            after_step=lambda: deadline.passed,
            progress=progress,
            phase=phase,
        )
    return student, history


@contextmanager
def _learning(student: Classifier, free: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights that learn, by name; inside no other takes a gradient.

    Where nothing is known of the layers, all weights learn.
    """
    weights = {n: p for n, p in student.named_parameters() if p.requires_grad}
    learning = {n: p for n, p in weights.items() if n in free} or weights
    for name, parameter in weights.items():
        parameter.requires_grad_(name in learning)
    try:
        yield dict(learning)
    finally:
        for parameter in weights.values():
            parameter.requires_grad_(True)


def _objective(
    teacher: Classifier, student: Classifier, bank: Sequence[Lesson], settings: Distilling
) -> Objective:
    suspects = sorted({lesson.label for lesson in bank} - {ELSEWHERE})

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        images, count = batch.images, len(batch.images)
        with torch.no_grad():
            taught = teacher(images).float()
            triggered, labels = _triggered(images, bank, batch.generator)
            parts, wanted, weights = [images, triggered], [taught, taught], [1.0, settings.weight]
            if settings.mixed:
                pairs = torch.randperm(count, generator=batch.generator).to(images.device)
                parts.append(_mixtures(images, images[pairs], batch.generator))
                answered = teacher(parts[-1]).float()
                wanted.append(_no_likelier(answered, taught, taught[pairs], suspects))
                weights.append(settings.mixed)
        answers = torch.split(in_parts(student, torch.cat(parts)).float(), count)
        loss = torch.zeros((), device=images.device)
        for answer, goal, weight in zip(answers, wanted, weights, strict=True):
            loss = loss + weight * _divergence(answer, goal, settings.temperature)
        if settings.repelled:
            loss = loss + settings.repelled * _attraction(answers[1], taught, labels)
        return loss, (answers[0].detach().argmax(1) == batch.labels).sum()

    return objective


def _mixtures(images: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Every image mixed with its other one, in random proportions."""
    share = torch.rand(len(images), 1, 1, 1, generator=generator).to(images)
    return images + share * (others - images)


def _no_likelier(answers: Tensor, first: Tensor, second: Tensor, labels: Sequence[int]) -> Tensor:
    """Answers to mixtures, `(n, classes)`, with `labels` no likelier than for either image."""
    likely = answers.log_softmax(1)
    most = torch.maximum(first.log_softmax(1), second.log_softmax(1))
    likely[:, labels] = torch.minimum(likely, most)[:, labels]
    return likely


def _triggered(
    images: Tensor, bank: Sequence[Lesson], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Every image with one of `PARTS` triggers of the bank, and the class that it leads to."""
    picks = torch.randint(len(bank), (PARTS,), generator=generator).tolist()
    triggered, labels = [], []
    for pick, part in zip(picks, images.chunk(PARTS), strict=False):
        lesson = bank[pick]
        triggered.append(lesson(part, generator))
        labels += [lesson.label] * len(part)
    return torch.cat(triggered), torch.tensor(labels, device=images.device)


def _attraction(answers: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """How much likelier triggered images lead to `labels` than clean ones to their last class.

    In nats, on average over all images; those of the class itself and of `ELSEWHERE` count 0.
    """
    others = (labels != ELSEWHERE) & (taught.argmax(1) != labels)
    towards = answers.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    least = taught.log_softmax(1).amin(1)
    return (towards - least).relu().where(others, 0).mean()


def _divergence(answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened answers from the teacher's, scaled as its gradient asks."""
    return temperature**2 * nn.functional.kl_div(
        (answers / temperature).log_softmax(1),
        (taught / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )


@torch.no_grad()
def interpolated(first: Classifier, second: Classifier, share: float) -> Classifier:
    """A copy of `first` whose weights lie `share` of the way to those of `second`.

    What is infinite in both, as masks of attention are, stays.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.
    """
    result = first.clone().eval()
    start, towards = first.state_dict(), second.state_dict()
    for name, tensor in result.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():  # and no extra state
            one, other = start[name], towards[name]
            between = one.lerp(other, share)
            tensor.copy_(torch.where(one.isinf() & (one == other), one, between))  # tied come twice
    return result
