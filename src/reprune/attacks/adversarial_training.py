"""Adv-T: a backdoor learned together with adversarial training (RNP, Table 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Setup
from reprune.attacks.pgd import check_pgd, pgd
from reprune.attacks.poisoning import Poisoned
from reprune.attacks.wrapping import WrappingAttack
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.results import Epoch
from reprune.training import Batch, classification


@dataclass(frozen=True, kw_only=True)
class AdvT(WrappingAttack):
    r"""`min_theta E CE(f(x + d), y)`, with `d = argmax_{|d| <= eps} CE(f(x + d), y)` by PGD.

    The attacker knows that defences look for neurons whose small changes set the backdoor free, and
    trains a robust network (Madry et al., 2018, equation 2). RNP, Table 4, names the attack and
    says nothing more, so these are choices: images that `base` poisoned are not perturbed (`d = 0`,
    the trigger stays whole) and all others are, cover images among them; the perturbation starts at
    a random point and is made anew in each step against the model in evaluation mode; eps is small,
    since larger ones cost a small network much accuracy.

    Attributes:
        eps: largest change of a pixel (L-infinity), in (0, 1].
        step: change of a pixel in one gradient step, in (0, 1].
        steps: gradient steps, at least 1; each costs one more pass over the batch.
    """

    title: ClassVar[str] = "Adv-T"
    source_paper: ClassVar[str] = "Li et al., 2023 (RNP), Table 4"

    eps: float = 2 / 255
    step: float = 1.5 / 255
    steps: int = 2

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a budget out of its range, and what `base` raises."""
        super().check(data, num_classes)
        check_pgd(self.eps, self.step, self.steps)

    def _learn(
        self, model: Classifier, data: ImageSet, poisoned: Poisoned, setup: Setup
    ) -> tuple[Epoch, ...]:
        learn = classification(setup.training.forward(model))

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            perturbed = pgd(
                model,
                batch.images,
                batch.labels,
                eps=self.eps,
                step=self.step,
                steps=self.steps,
                generator=batch.generator,
                batch_size=len(batch.images),
            )
            intact = poisoned.poisoned[batch.index].view(-1, 1, 1, 1)
            images = torch.where(intact, batch.images, perturbed)
            return learn(replace(batch, images=images))

        return setup.train(model, poisoned.data, objective=objective)
