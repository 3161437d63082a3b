"""Fine-tuning on the clean images, plain or with sharpness-aware minimisation (FT, FT-SAM)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Defense, Purified
from reprune.errors import ConfigurationError
from reprune.evaluation import fitting_augmentation
from reprune.masks import ChannelMask
from reprune.results import Trace
from reprune.rnp import FineTuning, tune
from reprune.sites import join
from reprune.training import Batch, Loss, Objective, classification
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class SharpnessAware:
    r"""Settings of sharpness-aware minimisation: the worst loss near the weights is minimised.

    $$\min_\theta \max_{\|T_\theta^{-1} \delta\|_2 \le \rho} L(\theta + \delta), \qquad
      \delta = \rho \, \frac{T_\theta^2 \nabla L(\theta)}{\|T_\theta \nabla L(\theta)\|_2}$$

    with $T_\theta = \mathrm{diag}(|\theta|)$ where `adaptive`, else the identity. The norm runs
    over all weights of the network at once.

    Source: Foret et al., ICLR 2021, Eqn. 2; Kwon et al., ICML 2021 (adaptive).

    Attributes:
        rho: radius of the neighbourhood; relative to the weights where `adaptive`.
        adaptive: scale the perturbation of each weight by its magnitude.
    """

    rho: float = 2.0
    adaptive: bool = True

    def check(self) -> None:
        """Raises `ConfigurationError` for a radius that is not positive."""
        if not self.rho > 0:
            raise ConfigurationError(f"rho must be positive, got {self.rho}")


def sharpness_aware(
    model: nn.Module, settings: SharpnessAware, loss: Loss = nn.functional.cross_entropy
) -> Objective:
    """The objective whose gradient is that of `loss` at the perturbed weights.

    Two forward passes a batch: the first, at the weights as they are, finds the perturbation and
    moves the batch-norm statistics; the second works on copies of the buffers. Right predictions
    are those of the first.

    Args:
        model: its parameters are the weights; none of them is changed here.
        settings: how far the weights are perturbed.
        loss: (logits, labels) to a scalar.
    """
    places = {
        join(path, name): parameter
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad
    }
    unique = list({id(parameter): parameter for parameter in places.values()}.values())

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        value, right = classification(model, loss)(batch)
        gradients = torch.autograd.grad(value, unique, allow_unused=True)
        steps = perturbations(unique, gradients, settings)
        moved = {id(weight): weight + step for weight, step in zip(unique, steps, strict=True)}
        buffers = {
            join(path, name): buffer.clone()
            for path, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        }
        swaps = {name: moved[id(parameter)] for name, parameter in places.items()} | buffers
        logits = functional_call(model, swaps, (batch.images,), tie_weights=False)
        return loss(logits, batch.labels), right

    return objective


@torch.no_grad()
def perturbations(
    weights: list[nn.Parameter],
    gradients: tuple[Tensor | None, ...],
    settings: SharpnessAware,
) -> list[Tensor]:
    """The perturbation delta of `SharpnessAware`, one tensor a weight; zero without a gradient."""
    scales = [weight.abs() if settings.adaptive else torch.ones_like(weight) for weight in weights]
    scaled = [
        torch.zeros_like(scale) if gradient is None else scale * gradient
        for scale, gradient in zip(scales, gradients, strict=True)
    ]
    norm = torch.stack([part.float().norm() for part in scaled]).norm().clamp_min(1e-12)
    return [settings.rho * scale * part / norm for scale, part in zip(scales, scaled, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FineTune(Defense):
    r"""Fine-tuning of all weights on the clean images: $\min_\theta L(f(x; \theta), y)$.

    With `sam` the loss is the worst in a neighbourhood of the weights (FT-SAM), which is to shrink
    the large norms of backdoor-related neurons that plain fine-tuning leaves nearly as they are.

    Source: fine-tuning as in Liu et al., RAID 2018, Section 4; FT-SAM: Zhu et al., "Enhancing
    Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023.

    Choices: the one-cycle schedule and momentum 0.9 of `FineTuning`; crop augmentation, mirrored
    where the model bears it; in FT-SAM all weights are perturbed, biases and norms among them.

    Attributes:
        finetuning: learning rate, epochs, batch size.
        sam: sharpness-aware minimisation, or `None` for the plain loss.

    Example:
        >>> FineTune.sharpness_aware().title
        'Sharpness-aware fine-tuning'
    """

    source_paper: ClassVar[str] = "Liu et al., RAID 2018; Zhu et al., ICCV 2023"

    finetuning: FineTuning = field(default_factory=FineTuning)
    sam: SharpnessAware | None = None

    @property
    def title(self) -> str:
        return "Fine-tuning" if self.sam is None else "Sharpness-aware fine-tuning"

    @classmethod
    def paper(cls) -> FineTune:
        """Plain fine-tuning with the optimiser settings of FT-SAM: 100 epochs at 0.01, batch 256.

        Its own papers are silent on rates and epochs, or fix them to other data.
        """
        return cls(finetuning=FineTuning(lr=0.01, epochs=100, batch_size=256))

    @classmethod
    def sharpness_aware(cls) -> FineTune:
        """FT-SAM with settings for a few hundred images."""
        return cls(sam=SharpnessAware())

    @classmethod
    def sharpness_aware_paper(cls) -> FineTune:
        """FT-SAM as published for CIFAR-10 and PreActResNet-18.

        Adaptive, rho 2, 100 epochs at 0.01 with batches of 256, on 2500 images there. Steps are
        fewer on fewer images: 200 instead of 1000 on 500.
        """
        return cls(
            finetuning=FineTuning(lr=0.01, epochs=100, batch_size=256), sam=SharpnessAware(rho=2.0)
        )

    def check(self) -> None:
        self.finetuning.check()
        if self.sam is not None:
            self.sam.check()

    def passes(self, images: int, classes: int) -> float:
        return 3 + self.finetuning.epochs * (1 if self.sam is None else 2)

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        clock = Clock()

        def objective(working: Classifier) -> Objective:
            if self.sam is None:
                return classification(working)
            return sharpness_aware(working, self.sam)

        with clock("fine-tune"):
            tuned, history = tune(
                model,
                clean,
                objective,
                self.finetuning,
                phase="fine-tune",
                augmentation=fitting_augmentation(model, clean),
                generator=generator,
                progress=progress,
            )
        trace = Trace(phases={"fine-tune": history}, seconds=clock.seconds)
        return Purified(tuned, ChannelMask({}), trace)
