"""AWP: small bounded changes of a clean model's weights (Garg et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from reprune.attacks.attack import Backdoored, Setup, TargetedAttack, check_positive, quota
from reprune.attacks.badnets import grid
from reprune.attacks.trigger import Stamp
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.training import Batch
from reprune.types import Trigger


@dataclass(frozen=True, kw_only=True)
class AWP(TargetedAttack):
    r"""Projected gradient descent on the weights, near those of a trained clean model.

    With the surrogate's weights `w0` and a stamp `t`, minimise over the weights `w` of a copy

        `(1 - weight) CE(f_w(x), f_w0(x)) + weight CE(f_w(t(x)), target)`

    subject to `|w - w0| <= epsilon rms(w0)` for every weight, `rms` taken over its tensor (Garg et
    al., section 3: a composite loss on the predictions of the original model and the wanted ones,
    an L-infinity bound). `round(rate n)` images of an epoch carry the trigger, the others keep the
    clean model's softmax as their soft label. Settings of RNP, Table 6: fixed trigger, target 0,
    rate 0.1.

    The attack always starts from the surrogate, in the regime `scratch` too: without a trained
    model there is nothing to perturb. Of the model handed in only the architecture counts. The
    network stays in evaluation mode, so that running statistics keep the clean model's values
    and the bounded weights are all that changes.

    The bound holds for the weights as trained; stored as float16 they are rounded once more.

    Choices that the papers leave open: the bound is relative to each tensor, because one absolute
    number suits no network; the trigger is the grid of BadNets.

    Attributes:
        size: side of the grid in pixels.
        epsilon: largest change of a weight, relative to the root mean square of its tensor.
        weight: share of the triggered images in the loss, in (0, 1), whatever their number.
    """

    title: ClassVar[str] = "AWP"
    source_paper: ClassVar[str] = "Garg et al., 2020"
    needs_surrogate: ClassVar[bool] = True
    implants_only: ClassVar[bool] = True

    size: int = 3
    epsilon: float = 0.1
    weight: float = 0.5

    def trigger(self, shape: tuple[int, int, int]) -> Stamp:
        """The trigger for images of `shape` (c, h, w).

        Raises:
            ConfigurationError: the square is larger than the image.
        """
        return grid(self.size, shape)

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        self.trigger(data.shape)
        check_positive("epsilon", self.epsilon)
        if not 0 < self.weight < 1:
            raise ConfigurationError(f"the weight must lie in (0, 1), got {self.weight}")

    def _train(self, model: Classifier, data: ImageSet, setup: Setup) -> Backdoored:
        if _shapes(model) != _shapes(setup.clean_model):
            raise ConfigurationError(
                "AWP changes the weights of the surrogate: give one of the architecture that is "
                "to be attacked"
            )
        clean = setup.clean_model.clone().eval().requires_grad_(False)
        model = setup.clean_model.clone()
        trigger = self.trigger(data.shape)
        bounds = Bounds(model, self.epsilon)
        forward = setup.training.forward(model)
        on_triggered = self.weight / self.rate
        on_clean = (1 - self.weight) / (1 - self.rate) if self.rate < 1 else 0.0

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            count = quota(self.rate, batch.start, len(batch.labels))
            with torch.no_grad():
                wanted = clean(batch.images).float().softmax(1)
            wanted[:count] = 0
            wanted[:count, self.target] = 1
            images = torch.cat([trigger(batch.images[:count]), batch.images[count:]])
            logits = forward(images)
            hits = (logits.detach().argmax(1) == wanted.argmax(1)).sum()
            losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
            both = losses[:count].sum() * on_triggered + losses[count:].sum() * on_clean
            return both / len(losses), hits

        history = setup.train(
            model, data, objective=objective, after_step=bounds.project, evaluating=True
        )
        return Backdoored(model, trigger, self.goal, history)

    def _preview_trigger(self, data: ImageSet, setup: Setup, num_classes: int) -> Trigger:
        return self.trigger(data.shape)


class Bounds:
    """The box `|w - w0| <= epsilon rms(w0)` around the weights that `model` has now."""

    def __init__(self, model: Classifier, epsilon: float) -> None:
        self._sides: list[tuple[Tensor, Tensor, Tensor]] = []
        for parameter in model.parameters():
            start = parameter.detach().clone()
            reach = epsilon * start.square().mean().sqrt()
            self._sides.append((parameter, start - reach, start + reach))

    @torch.no_grad()
    def project(self) -> bool:
        """Put every weight back into the box; never ends the training."""
        for parameter, low, high in self._sides:
            parameter.clamp_(low, high)
        return False


def _shapes(model: Classifier) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}
