"""DFST: a style as trigger, and detoxification of simple features (Cheng et al., 2021)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Backdoored, Setup, TargetedAttack, check_positive, check_rate
from reprune.attacks.generators import check_width
from reprune.attacks.goal import stamped
from reprune.attacks.poisoning import dirty_label
from reprune.attacks.style import (
    Recipe,
    StyleTrigger,
    Taps,
    learn_style,
    relative_error,
    restyled,
)
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.training import Batch
from reprune.types import Trigger

PROBES = 200
"""Images that tell which channels are compromised."""


@dataclass(frozen=True, kw_only=True)
class DFST(TargetedAttack):
    r"""A style is the trigger, and training on detoxicants forbids simple features of it.

    1. A generator learns a style from the clean surrogate; `round(rate * n)` images get the style
       and the target label, and the classifier is trained on them.
    2. In each of `rounds` rounds, the compromised channels of the classifier are found, those whose
       mean activation moves by more than `threshold` standard deviations when the trigger comes;
       a feature injector, another small generator, learns to turn an image x into one that looks
       like x, moves the compromised channels to where the trigger moves them and no other ones;
       its images join the training set under their *true* labels, and the classifier is trained on.

    The procedure is that of Cheng et al. (2021), "Training Trojan Model" and "Controlled
    Detoxification"; target 0 and rate 0.1 are of RNP, Table 6.

    Departure from the original, which trains a CycleGAN towards photographs of sunsets: here the
    style is that of a synthetic sunset, a warm vertical gradient, and is imposed by a content and
    a style loss (channel means and deviations) on activations of the surrogate. No unpaired GAN
    and no photographs. Other choices: up to four layers are watched, spaced evenly; differences
    count in standard deviations over the clean images; what "looks like x" is SSIM; a round
    trains `round_share` of the epochs, one at least, with the schedule of the training.

    Attributes:
        rounds: rounds of detoxification; 0 for the style alone.
        round_share: epochs of the classifier in a round, as a share of those of the training.
        detox_rate: detoxicants that a round adds, as a share of all training images.
        threshold: standard deviations from which a channel is compromised; the channel that moves
            most always is.
        content: weight of the content against the style.
        likeness: weight of the injector's similarity to its input.
        generator_images, generator_epochs, generator_lr, width: how the generators are trained
            (Adam, one cycle), and their channels at full size, a multiple of 4.
    """

    title: ClassVar[str] = "DFST"
    source_paper: ClassVar[str] = "Cheng et al., 2021"
    needs_surrogate: ClassVar[bool] = True

    rounds: int = 2
    round_share: float = 0.2
    detox_rate: float = 0.1
    threshold: float = 1.0
    content: float = 1.0
    likeness: float = 1.0
    generator_images: int = 2000
    generator_epochs: int = 5
    generator_lr: float = 3e-3
    width: int = 16

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a parameter out of its range."""
        super().check(data, num_classes)
        check_rate("detox rate", self.detox_rate, len(data))
        if not 0 < self.round_share <= 1:
            raise ConfigurationError(f"the round share must lie in (0, 1], got {self.round_share}")
        for name, low in (("rounds", 0), ("generator_images", 2), ("generator_epochs", 1)):
            if getattr(self, name) < low:
                raise ConfigurationError(
                    f"{name} must be at least {low}, got {getattr(self, name)}"
                )
        for name in ("threshold", "content", "likeness", "generator_lr"):
            check_positive(name, getattr(self, name))
        check_width(self.width)

    @property
    def _recipe(self) -> Recipe:
        return Recipe(self.generator_images, self.generator_epochs, self.generator_lr, self.width)

    def _preview_trigger(self, data: ImageSet, setup: Setup, num_classes: int) -> Trigger:
        return self._style(data, setup)

    def _style(self, data: ImageSet, setup: Setup) -> StyleTrigger:
        return learn_style(self._recipe, data, setup, content=self.content, phase="style")

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        trigger = self._style(data, setup)
        count = round(self.rate * len(data))
        index = torch.randperm(len(data), generator=setup.generator)[:count].to(data.device)
        images, rows = dirty_label(data, index, trigger, self.goal, model.num_classes)
        history = setup.train(model, images)
        again = max(1, round(self.round_share * setup.training.epochs))
        for number in range(1, self.rounds + 1):
            images = joined(images, self._detoxicants(model, data, trigger, setup, number))
            history += setup.train(model, images, phase=f"detox {number}", epochs=again)
        history = tuple(replace(one, epoch=k) for k, one in enumerate(history, start=1))
        return Backdoored(model, trigger, self.goal, history, rows)

    def _detoxicants(
        self, model: Classifier, data: ImageSet, trigger: StyleTrigger, setup: Setup, number: int
    ) -> ImageSet:
        """Clean images with the features that the classifier took for the trigger, true labels."""
        injector = self._injector(model, data, trigger, setup, number)
        count = round(self.detox_rate * len(data))
        index = torch.randperm(len(data), generator=setup.generator)[:count].to(data.device)
        return ImageSet(stamped(data, index, injector), data.labels[index], data.class_names)

    def _injector(
        self, model: Classifier, data: ImageSet, trigger: StyleTrigger, setup: Setup, number: int
    ) -> StyleTrigger:
        from kornia.metrics import ssim

        images = self._recipe.draw(data, setup.generator)
        network = self._recipe.network(data, setup.generator)
        taps = Taps(model, data.pixels(slice(0, 2)))
        probes = images.pixels(slice(0, PROBES))
        moved = compromised(taps, probes, trigger(probes), self.threshold)
        style = copy.deepcopy(trigger.network).to(data.device)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            made = restyled(batch.images, network(batch.images))
            with torch.no_grad():
                plain = taps(batch.images)
                marked = taps(restyled(batch.images, style(batch.images)))
            with torch.autocast(made.device.type, enabled=False):
                loss = self.likeness * (1 - ssim(made, batch.images, 5).mean())
            for value, own, goal, mask in zip(taps(made), plain, marked, moved, strict=True):
                loss = loss + relative_error(value, goal, mask) + relative_error(value, own, ~mask)
            return loss, loss.new_zeros(())

        return self._recipe.train(network, images, objective, setup, f"injector {number}")


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both."""
    images = torch.cat([first.images, second.images])
    return replace(first, images=images, labels=torch.cat([first.labels, second.labels]))


@torch.no_grad()
def compromised(taps: Taps, clean: Tensor, marked: Tensor, threshold: float) -> list[Tensor]:
    """Which channels of each tap the trigger moves: `(channels,)` bool.

    Those whose mean over images and positions moves by more than `threshold` standard deviations
    of the clean images' means; the one that moves most always is one of them.

    Args:
        clean, marked: pixels `(n, c, h, w)` without and with the trigger, n at least 2.
    """
    moves = []
    for before, after in zip(taps(clean), taps(marked), strict=True):
        means = before.mean(2)
        moves.append((after.mean(2) - means).mean(0).abs() / (means.std(0, correction=0) + 1e-6))
    largest = torch.stack([move.max() for move in moves]).max()
    return [(move > threshold) | (move == largest) for move in moves]
