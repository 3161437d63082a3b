"""`ABLIsolation`: poisoned training images are learned first and fastest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet, check_defence_data
from reprune.defense import Need
from reprune.detection.filtering import Filter, Filtered
from reprune.errors import ConfigurationError, DivergenceError, ModelError
from reprune.evaluation import predict
from reprune.results import Epoch, Trace
from reprune.training import classification, fit
from reprune.types import Progress, silent


@dataclass(frozen=True)
class Isolated:
    """The images that a model in training found easiest.

    Attributes:
        index: `(k,)` int64, rows of the training data by rising loss.
        losses: `(n,)` float32, cross-entropy of each training image after the isolation epochs.
        model: the classifier trained for these epochs, in evaluation mode.
        history: one `Epoch` a pass; losses are those with local gradient ascent.
    """

    index: Tensor
    losses: Tensor
    model: Classifier
    history: tuple[Epoch, ...]


@dataclass(frozen=True, kw_only=True)
class ABLIsolation(Filter):
    r"""Train anew for a few epochs with local gradient ascent; flag the images of lowest loss.

    $$L_{LGA} = E_{(x, y)} [\mathrm{sign}(L(f(x), y) - \gamma) \, L(f(x), y)]$$

    A loss that falls below gamma is pushed up again. Poisoned images, which a network learns
    within the first epochs, stay low nevertheless, while clean ones hover around gamma. The
    score of an image is minus its loss.

    Source: Li et al., "Anti-Backdoor Learning", NeurIPS 2021, Section 3.3; settings of Section
    4. Choices where it is silent: a constant learning rate, and no augmentation, since a crop
    can cut off a trigger at the edge.

    The flagged share is given, not found: with fewer poisoned images than that, clean ones are
    flagged too; in clean data all of them are clean.

    Attributes:
        epochs: passes over the training data before the isolation.
        gamma: where local gradient ascent holds the loss, in nats, at least 0; 0 is plain
            training.
        share: of the images that is isolated, in (0, 1); at least one image.
        lr, weight_decay: of SGD with momentum 0.9.
        batch_size: images a step.
        reinitialise: train from fresh weights; without it, from the weights of the model as they
            are, which should then be untrained.
    """

    title: ClassVar[str] = "Isolation of Anti-Backdoor Learning"
    source_paper: ClassVar[str] = "Li et al., NeurIPS 2021"
    needs: ClassVar[tuple[Need, ...]] = ("training data",)
    asks_trained: ClassVar[bool] = False

    epochs: int = 20
    gamma: float = 0.5
    share: float = 0.01
    lr: float = 0.1
    weight_decay: float = 1e-4
    batch_size: int = 64
    reinitialise: bool = True

    @classmethod
    def paper(cls) -> ABLIsolation:
        """20 epochs, gamma 0.5, 1 % isolated; SGD 0.1, weight decay 1e-4, batches of 64."""
        return cls()

    def check(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigurationError(
                f"epochs must be at least 1 and batch_size 2, got {self.epochs} and "
                f"{self.batch_size}"
            )
        if not self.lr > 0:
            raise ConfigurationError(f"lr must be positive, got {self.lr}")
        for name in ("gamma", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.share < 1:
            raise ConfigurationError(f"share must lie in (0, 1), got {self.share}")

    def passes(self, images: int, classes: int) -> float:
        return 1 + self.epochs + 1

    def judge(
        self,
        model: Classifier,
        images: ImageSet,
        clean: ImageSet | None,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Filtered:
        start = time.perf_counter()
        isolated = self.isolate(model, images, generator=generator, progress=progress)
        flagged = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        flagged[isolated.index] = True
        reason = (
            f"the {len(isolated.index)} images of lowest loss ({self.share:.2%}) after "
            f"{self.epochs} epochs with local gradient ascent are flagged"
        )
        seconds = {"isolate": round(time.perf_counter() - start, 3)}
        trace = Trace(phases={"isolate": isolated.history}, seconds=seconds)
        return Filtered(-isolated.losses, flagged, None, (reason,), trace=trace)

    def isolate(
        self,
        model: Classifier,
        training: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Isolated:
        """Train a copy of `model` and find the images of lowest loss.

        Args:
            model: gives the architecture; it is never changed.
            training: labelled images, some poisoned, moved to the model's device.
            generator: all randomness, a CPU generator.
            progress: told after each step.

        Raises:
            ConfigurationError: a hyper-parameter out of its range.
            DataError: data that cannot be used.
            ModelError: a parameter that cannot be initialised anew.
            DivergenceError: the loss or the outputs became NaN or infinite.
        """
        self.check()
        training = training.to(model.device)
        check_defence_data(training, model.num_classes, min_per_class=0)
        fresh = reinitialised(model, generator) if self.reinitialise else model.clone()
        working = fresh.settle(training.pixels(slice(0, 2))).laid_out().train()
        parameters = list(working.parameters())
        history = fit(
            classification(working, local_gradient_ascent(self.gamma)),
            parameters,
            training,
            optimizer=torch.optim.SGD(
                parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
            ),
            epochs=self.epochs,
            batch_size=self.batch_size,
            generator=generator,
            progress=progress,
            phase="isolate",
        )
        logits = predict(working.eval(), training)
        losses = nn.functional.cross_entropy(logits, training.labels, reduction="none")
        if not bool(losses.isfinite().all()):
            raise DivergenceError(
                f"isolate diverged in epoch {len(history)}: the outputs are NaN or infinite; "
                "lower the learning rate"
            )
        count = max(1, round(self.share * len(training)))
        return Isolated(losses.argsort(stable=True)[:count], losses, working.eval(), tuple(history))


def local_gradient_ascent(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The loss $E[\mathrm{sign}(l - \gamma) \, l]$, $l$ the cross-entropy of an image in nats."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return (torch.sign(each.detach() - gamma) * each).mean()

    return loss


def reinitialised(model: Classifier, generator: torch.Generator) -> Classifier:
    """A copy of `model` with fresh weights, by each module's own `reset_parameters`.

    The weights are drawn on the CPU, so that they are the same on every device. Process-wide
    generators are left as they were.

    Raises:
        ModelError: parameters that no `reset_parameters` sets.
    """
    fresh = model.clone().to("cpu")
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for parameter in fresh.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
        for module in fresh.modules():
            for name in ("reset_parameters", "_reset_parameters"):
                reset = getattr(module, name, None)
                if callable(reset):
                    reset()
                    break
    missed = [name for name, value in fresh.named_parameters() if bool(value.isnan().any())]
    if missed:
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        raise ModelError(
            "the network cannot be trained anew: no module's reset_parameters sets "
            f"{', '.join(missed[:5])}{more}; pass an untrained network and reinitialise=False"
        )
    return fresh.to(model.device)
