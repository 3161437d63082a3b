"""Adapt-D: a backdoor whose features are those of the clean target class (RNP, Table 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from reprune.attacks.attack import Backdoored, Setup
from reprune.attacks.features import Features
from reprune.attacks.poisoning import Poisoned
from reprune.attacks.wrapping import WrappingAttack
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.precision import autocast
from reprune.results import Epoch
from reprune.training import Batch

BATCH = 500
PHASE = "class features"


@dataclass(frozen=True, kw_only=True)
class AdaptD(WrappingAttack):
    r"""`min_theta E[CE(f(x), y) + weight |u(h(x)) - z(x, y)|^2]`, `u(v) = v / |v|`.

    The attacker knows that the defence looks for channels that serve the backdoor alone, and ties
    the penultimate features `h` of the model to those of a clean teacher `g`, the surrogate: `z` is
    `u(g(x))` for images that `base` did not poison and, for poisoned ones, the direction of the
    mean of `u(g(x))` over the clean training images of the class `y` that they are trained to get.
    Triggered images then look to the last layer like clean images of the target class. RNP, Table
    4, names the attack and says nothing more; all of this is a choice.

    Penultimate features are the input of the last layer. `Training.compile` has no effect here.

    Attributes:
        weight: of the distance, at least 0; the distance itself lies in [0, 4].
    """

    title: ClassVar[str] = "Adapt-D"
    source_paper: ClassVar[str] = "Li et al., 2023 (RNP), Table 4"
    needs_surrogate: ClassVar[bool] = True

    weight: float = 5.0

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a weight out of its range, and what `base` raises."""
        super().check(data, num_classes)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigurationError(f"the weight must be at least 0, got {self.weight}")

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        few = data.pixels(slice(0, 2))
        widths = [Features(one, few).width for one in (model, setup.clean_model)]
        if widths[0] != widths[1]:
            raise ConfigurationError(
                f"{self.title} needs a surrogate with as many features before its last layer as "
                f"the model, {widths[0]}, got {widths[1]}"
            )
        return super()._train(model, data, setup)

    def _learn(
        self, model: Classifier, data: ImageSet, poisoned: Poisoned, setup: Setup
    ) -> tuple[Epoch, ...]:
        few = data.pixels(slice(0, 2))
        student, teacher = Features(model, few), Features(setup.clean_model.clone().eval(), few)
        means = class_features(teacher, data, model.num_classes, setup)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                clean = normalize(teacher(batch.images)[0].float())
                rows = poisoned.poisoned[batch.index].unsqueeze(1)
                wanted = torch.where(rows, means[batch.labels], clean)
            features, logits = student(batch.images)
            distance = (normalize(features.float()) - wanted).square().sum(1).mean()
            loss = cross_entropy(logits.float(), batch.labels) + self.weight * distance
            return loss, (logits.detach().argmax(1) == batch.labels).sum()

        return setup.train(model, poisoned.data, objective=objective)


@torch.no_grad()
def class_features(teacher: Features, data: ImageSet, num_classes: int, setup: Setup) -> Tensor:
    """The direction of the mean unit feature of each class, `(classes, width)`, float32.

    A class without images gets zeros.
    """
    total = torch.zeros(num_classes, teacher.width, device=data.device)
    done = 0
    for images, labels in data.batches(BATCH):
        with autocast(data.device):
            features, _ = teacher(images)
        total.index_add_(0, labels, normalize(features.float()))
        done += len(images)
        setup.progress(PHASE, done, len(data))
    return normalize(total)
