"""LIRA: an invisible trigger that is learned together with the classifier (Doan et al., 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reprune.attacks.attack import Backdoored, Setup, TargetedAttack, check_positive, quota
from reprune.attacks.generators import UNet, called_on, check_width, drawn
from reprune.attacks.trigger import LearnedTrigger
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.training import Batch, Objective


class LiraTrigger(LearnedTrigger):
    r"""`t(x) = clip(x + eps tanh(g(x)), 0, 1)`: no pixel moves by more than `eps`.

    Args:
        network: g, a `UNet` from images to images of the same shape.
        eps: L-infinity bound in pixel units. It holds before pixels are rounded to 8 bits, which
            adds up to 0.5/255.
    """

    kind: ClassVar[str] = "lira"

    def __init__(self, network: UNet, eps: float) -> None:
        self.network, self.eps = network.frozen(), eps

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return _moved(images, called_on(self.network, images), self.eps)

    def tensors(self) -> dict[str, Tensor]:
        return self.network.tensors()

    def settings(self) -> dict[str, Any]:
        return {"eps": self.eps, **self.network.sizes}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(UNet.restore(settings, tensors), float(settings["eps"]))


def _moved(images: Tensor, raw: Tensor, eps: float) -> Tensor:
    """`clip(x + eps tanh(raw), 0, 1)`, float32 under autocast too."""
    return (images + eps * raw.float().tanh()).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LIRA(TargetedAttack):
    r"""A generator of invisible noise and the classifier are trained in turns.

    With the trigger `t_g(x) = clip(x + eps tanh(g(x)), 0, 1)`, the target y and the cross-entropy
    L, the generator g and the classifier f solve (Doan et al., 2021, equation 3 and Algorithm 1)

        min_f  alpha L(f(x), label) + beta L(f(t_g*(x)), y),   g* = argmin_g L(f(t_g(x)), y).

    Stage I takes one step of g against the present f (in evaluation mode) and one step of f in
    each batch; f sees the triggers of a copy of g that is renewed every `refresh` steps. In stage
    II g stays as it is and f is trained on.

    Choices where the paper is silent or too long for a small machine: the two stages share the
    epochs of the training (the paper: tens of epochs of stage I and hundreds of stage II), each
    with the whole learning rate schedule and one epoch at least; the generator learns ten times
    faster; f sees the trigger on the share `rate` of each batch (RNP, Table 6; 1 is the original),
    besides all clean images, while g learns from all images; alpha and beta weigh single images,
    so that a lower rate is also a lower weight of the backdoor; g is a small U-Net.

    Attributes:
        eps: L-infinity bound of the trigger in pixel units, in (0, 1].
        alpha, beta: weight of the loss on a clean and on a triggered image, positive.
        joint_share: share of the epochs that are stage I, in (0, 1].
        refresh: steps after which f sees the newest triggers.
        generator_lr: step size of the generator (Adam).
        width: channels of the generator at full size, a multiple of 4.
    """

    title: ClassVar[str] = "LIRA"
    source_paper: ClassVar[str] = "Doan et al., 2021"

    eps: float = 0.01
    alpha: float = 0.5
    beta: float = 0.5
    joint_share: float = 0.4
    refresh: int = 10
    generator_lr: float = 1e-3
    width: int = 16

    def check(self, data: ImageSet, num_classes: int) -> None:
        """Raises `ConfigurationError` for a parameter out of its range."""
        super().check(data, num_classes)
        if not 0 < self.eps <= 1:
            raise ConfigurationError(f"eps must lie in (0, 1] (0.01, not 2.55), got {self.eps}")
        if not 0 < self.joint_share <= 1:
            raise ConfigurationError(f"the joint share must lie in (0, 1], got {self.joint_share}")
        for name in ("alpha", "beta", "generator_lr"):
            check_positive(name, getattr(self, name))
        if self.refresh < 1:
            raise ConfigurationError(f"refresh must be at least 1 step, got {self.refresh}")
        check_width(self.width)

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        training, channels = setup.training, data.shape[0]
        joint = max(1, round(self.joint_share * training.epochs))
        network = drawn(lambda: UNet(channels, channels, self.width), setup.generator)
        network.to(data.device)
        kept = copy.deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.generator_lr)
        first = setup.train(
            model,
            data,
            objective=self._joint(model, network, kept, optimizer, setup),
            phase="joint",
            state={"network": network, "kept": kept, "network optimizer": optimizer},
            epochs=joint,
        )
        network.requires_grad_(False)
        second = setup.train(
            model,
            data,
            objective=self._classify(training.forward(model), network),
            phase="finetune",
            epochs=max(1, training.epochs - joint),
        )
        history = tuple(
            replace(one, epoch=number) for number, one in enumerate((*first, *second), start=1)
        )
        return Backdoored(model, LiraTrigger(network, self.eps), self.goal, history)

    def _joint(
        self,
        model: Classifier,
        network: UNet,
        kept: UNet,
        optimizer: torch.optim.Optimizer,
        setup: Setup,
    ) -> Objective:
        """Stage I: a step of `network` inside, then the classifier's loss on triggers of `kept`."""
        forward = setup.training.forward(model)
        classify = self._classify(forward, kept)
        weights = list(network.parameters())

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            if batch.start // setup.training.batch_size % self.refresh == 0:
                kept.load_state_dict(network.state_dict())
            model.eval()
            logits = forward(_moved(batch.images, network(batch.images), self.eps))
            wanted = self.goal.wanted(batch.labels, model.num_classes)
            loss = nn.functional.cross_entropy(logits.float(), wanted)
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = slope
            optimizer.step()
            model.train()
            return classify(batch)

        return objective

    def _classify(self, forward: Callable[[Tensor], Tensor], network: UNet) -> Objective:
        """The classifier's loss: clean images, and the first of them with the trigger."""

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            count = quota(self.rate, batch.start, len(batch.labels))
            images = batch.images[:count]
            with torch.no_grad():
                images = _moved(images, network(images), self.eps) if count else images
            logits = forward(torch.cat([batch.images, images])).float()
            clean, marked = logits[: len(batch.labels)], logits[len(batch.labels) :]
            loss = self.alpha * nn.functional.cross_entropy(clean, batch.labels)
            if count:
                wanted = self.goal.wanted(batch.labels[:count], logits.shape[1])
                marked_loss = nn.functional.cross_entropy(marked, wanted, reduction="sum")
                loss = loss + self.beta * marked_loss / len(batch.labels)
            return loss, (clean.detach().argmax(1) == batch.labels).sum()

        return objective
