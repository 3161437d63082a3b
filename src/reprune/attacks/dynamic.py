"""Dynamic (input-aware): every image has a trigger of its own (Nguyen & Tran, 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reprune.attacks.attack import (
    Backdoored,
    Setup,
    TargetedAttack,
    check_positive,
    check_share,
    quota,
)
from reprune.attacks.generators import UNet, called_on, check_width, drawn
from reprune.attacks.trigger import LearnedTrigger
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError
from reprune.training import Batch, Objective, fit


class DynamicTrigger(LearnedTrigger):
    r"""`t(x) = x + m(x) (p(x) - x)`: a mask and a pattern in [0, 1], both made from x itself.

    Args:
        mask: a `UNet` from images to one channel; see `mask_of`.
        pattern: a `UNet` from images to images; `p(x) = sigmoid(pattern(x))`.
    """

    kind: ClassVar[str] = "dynamic"

    def __init__(self, mask: UNet, pattern: UNet) -> None:
        self.mask, self.pattern = mask.frozen(), pattern.frozen()

    def __call__(self, images: Tensor) -> Tensor:
        return self.crossed(images, images)

    @torch.no_grad()
    def crossed(self, images: Tensor, others: Tensor) -> Tensor:
        """`images` with the triggers of `others`, all `(n, c, h, w)` in [0, 1].

        A backdoored classifier should give the true labels of `images`, unless both are the same.
        """
        masks = mask_of(called_on(self.mask, others))
        return _stamped(images, masks, _pattern_of(called_on(self.pattern, others)))

    def tensors(self) -> dict[str, Tensor]:
        parts = {"mask": self.mask, "pattern": self.pattern}
        return {
            f"{part}.{name}": value
            for part, network in parts.items()
            for name, value in network.tensors().items()
        }

    def settings(self) -> dict[str, Any]:
        return {"mask": self.mask.sizes, "pattern": self.pattern.sizes}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        networks = (
            UNet.restore(
                settings[part],
                {
                    name.removeprefix(f"{part}."): value
                    for name, value in tensors.items()
                    if name.startswith(f"{part}.")
                },
            )
            for part in ("mask", "pattern")
        )
        return cls(*networks)


def mask_of(raw: Tensor) -> Tensor:
    """`sigmoid(40 sigmoid(raw) - 20)`: nearly 0 or 1, float32 under autocast too."""
    return (40 * raw.float().sigmoid() - 20).sigmoid()


def _pattern_of(raw: Tensor) -> Tensor:
    return raw.float().sigmoid()


def _stamped(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    return (images + (patterns - images) * masks).clamp(0, 1)


def diversity(images: Tensor, made: Tensor) -> Tensor:
    r"""Mean of `|x_i - x_(i+1)| / (|g_i - g_(i+1)| + 1e-3)` over neighbours in the batch.

    Small where different images have different triggers (Nguyen & Tran, 2020, equation 7).
    Distances are roots of the mean square over pixels and channels.

    Args:
        images: `(n + 1, c, h, w)`, n at least 1.
        made: `(n + 1, ...)`, what a generator made of each.
    """
    return (_steps(images) / (_steps(made) + 1e-3)).mean()


def _steps(values: Tensor) -> Tensor:
    """Distance of each row to the next, `(n,)`."""
    return ((values[1:] - values[:-1]).square().flatten(1).mean(1) + 1e-12).sqrt()


@dataclass(frozen=True, kw_only=True)
class Dynamic(TargetedAttack):
    r"""A generator makes a trigger for each image, which works on no other image.

    With the trigger `t(x, z) = x + m(z) (p(z) - x)` that is made from z, the mask generator m is
    trained first, to minimise

        density_weight mean(max(m(x) - density, 0)) + diversity(m),

    and then stays as it is. The pattern generator p and the classifier f are trained together to
    minimise (Nguyen & Tran, 2020, section 3)

        L(f(images), labels) + diversity_weight diversity(p),

    where in each batch the share `rate` is `t(x, x)` with the target label and the share
    `cross_rate` is `t(x, z)` for another image z with the label of x. `diversity` is the mean
    ratio of the distance of two images to the distance of what is made of them.

    Choices: the other image is the next one of the shuffled batch; generators are small U-Nets;
    masks are trained for few epochs (the original: 25), and 1e-3 is added to the distance in the
    ratio. The original weighs the density by 100 with images that are divided by their standard
    deviation, about a quarter; in pixel units that is 25.

    Attributes:
        cross_rate: share of the images with the trigger of another one, in [0, 1 - rate].
        density: share of the image that a mask may cover, in (0, 1).
        density_weight, diversity_weight: see above; positive.
        mask_epochs: passes over the images for the mask generator.
        generator_lr: step size of both generators (Adam).
        width: channels of the generators at full size, a multiple of 4.
    """

    title: ClassVar[str] = "Dynamic"
    source_paper: ClassVar[str] = "Nguyen & Tran, 2020"

    cross_rate: float = 0.1
    density: float = 0.032
    density_weight: float = 25.0
    diversity_weight: float = 1.0
    mask_epochs: int = 1
    generator_lr: float = 0.01
    width: int = 16

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a parameter out of its range."""
        super().check(data, num_classes)
        check_share("cross rate", self.cross_rate, self.rate)
        if not 0 < self.density < 1:
            raise ConfigurationError(f"the mask density must lie in (0, 1), got {self.density}")
        for name in ("density_weight", "diversity_weight", "generator_lr"):
            check_positive(name, getattr(self, name))
        if self.mask_epochs < 1:
            raise ConfigurationError(f"mask_epochs must be at least 1, got {self.mask_epochs}")
        check_width(self.width)

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        channels = data.shape[0]
        mask = self._learn_mask(data, setup)
        pattern = drawn(lambda: UNet(channels, channels, self.width), setup.generator)
        pattern.to(data.device)
        optimizer = self._adam(pattern)

        def step() -> bool:
            """The classifier's step left the gradients of the pattern generator in place."""
            optimizer.step()
            optimizer.zero_grad()
            return False

        history = setup.train(
            model,
            data,
            objective=self._joint(model, mask, pattern, setup),
            after_step=step,
            phase="joint",
            state={"pattern": pattern, "pattern optimizer": optimizer},
        )
        return Backdoored(model, DynamicTrigger(mask, pattern), self.goal, history)

    def _adam(self, network: UNet) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=self.generator_lr, betas=(0.5, 0.9))

    def _learn_mask(self, data: ImageSet, setup: Setup) -> UNet:
        """The mask generator, trained on all images."""
        network = drawn(lambda: UNet(data.shape[0], 1, self.width), setup.generator)
        network.to(data.device)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            masks = mask_of(network(batch.images))
            loss = self.density_weight * (masks - self.density).relu().mean()
            if len(masks) > 1:
                loss = loss + diversity(batch.images, masks)
            return loss, loss.new_zeros(())

        fit(
            objective,
            list(network.parameters()),
            data,
            optimizer=self._adam(network),
            epochs=self.mask_epochs,
            batch_size=setup.training.batch_size,
            generator=setup.generator,
            augment=Augmentation(setup.training.padding, setup.training.mirror),
            progress=setup.progress,
            phase="mask",
            checkpoints=setup.checkpoints,
            state={"mask": network},
            precision=setup.training.precision,
        )
        return network.requires_grad_(False)

    def _joint(self, model: Classifier, mask: UNet, pattern: UNet, setup: Setup) -> Objective:
        """Loss of both; the first images have their own triggers, the next ones a neighbour's."""
        forward = setup.training.forward(model)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            size = len(batch.labels)
            count = quota(self.rate, batch.start, size)
            both = min(count + quota(self.cross_rate, batch.start, size), size)
            images, labels, extra = batch.images, batch.labels, batch.images.new_zeros(())
            if both:
                sources = torch.cat([images, images[:1]])[: both + 1]
                patterns, masks = _pattern_of(pattern(sources)), mask_of(mask(sources))
                own = _stamped(images[:count], masks[:count], patterns[:count])
                crossed = _stamped(images[count:both], masks[count + 1 :], patterns[count + 1 :])
                wanted = self.goal.wanted(labels[:count], model.num_classes)
                images = torch.cat([own, crossed, images[both:]])
                labels = torch.cat([wanted, labels[count:]])
                if count:
                    extra = diversity(sources[: count + 1], patterns[: count + 1])
            logits = forward(images).float()
            loss = nn.functional.cross_entropy(logits, labels) + self.diversity_weight * extra
            return loss, (logits.detach().argmax(1) == labels).sum()

        return objective
