"""The only training loop: methods hand it an objective and the tensors to fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from reprune.checkpoints import Checkpoints, Position, Resumable, Stateful
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, at_once
from reprune.errors import ConfigurationError, DivergenceError
from reprune.precision import Precision, autocast
from reprune.results import Epoch
from reprune.types import Progress, silent

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> scalar to minimise."""

Schedule = Callable[[int, int], float]
"""(step, total steps) -> factor on the learning rate."""


Schedules = Literal["one-cycle", "steps"]


@dataclass(frozen=True)
class Batch:
    """What an objective gets.

    Attributes:
        images: pixels `(n, c, h, w)`, augmented, channels last.
        labels: `(n,)`.
        index: `(n,)`, the rows of the data set.
        start: rows of this epoch that came before.
        epoch: counts from 0.
        generator: for randomness of the objective.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    start: int
    epoch: int
    generator: torch.Generator


Objective = Callable[[Batch], tuple[Tensor, Tensor]]
"""A batch to (scalar to minimise, number of right predictions as a scalar tensor)."""


def classification(
    forward: Callable[[Tensor], Tensor], loss: Loss = nn.functional.cross_entropy
) -> Objective:
    """The plain objective: `loss(forward(images), labels)`."""

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = forward(batch.images)
        return loss(logits, batch.labels), (logits.detach().argmax(1) == batch.labels).sum()

    return objective


def in_parts(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`forward(images)` of a batch `(n, c, h, w)`, in parts where they have over 64 x 64 pixels.

    The backward pass goes through `forward` again, part by part, so that it keeps the activations
    of one only. For what answers each image by itself: with batch norms in training mode, or
    without running statistics, the parts would answer otherwise than the whole.
    """
    parts = torch.split(images, at_once(len(images), images.shape[1:]))
    if len(parts) == 1:
        return forward(images)
    with set_checkpoint_early_stop(False):  # the network may catch exceptions, and have hooks
        return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts])


def one_cycle(step: int, total: int, warmup: float = 0.2) -> float:
    """Linear from 0 to 1 over the first `warmup` of the steps, then linear to `1 / total`."""
    position = (step + 1) / total
    if position < warmup:
        return position / warmup
    return min(1.0, (1 - position) / (1 - warmup) + 1 / total)


@contextmanager
def seeded(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Inside, dropout draws from a stream that `generator` fixes; it is not advanced itself."""
    seed = int(torch.randint(2**31, (), generator=generator.clone_state()))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def fit(
    objective: Objective,
    parameters: Sequence[Tensor],
    data: ImageSet,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    augment: Augmentation | None = None,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    after_step: Callable[[], bool] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
    progress: Progress = silent,
    phase: str = "train",
    checkpoints: Checkpoints | None = None,
    state: Mapping[str, Stateful] | None = None,
    precision: Precision = "auto",
) -> list[Epoch]:
    r"""Minimise `objective(batch)` over `parameters`, in place.

    Inside a step nothing waits for the device: losses and hits are summed there and read once an
    epoch. With `checkpoints`, a run that was killed at any moment goes on from its last
    checkpoint and ends, on the CPU, with the same bits as one that was not.

    Args:
        objective: a `Batch` to (scalar loss, right predictions); see `classification`.
        parameters: the leaf tensors that `optimizer` holds; used for clipping.
        data: labelled images on the device of the parameters.
        optimizer: any `torch.optim` optimiser over `parameters`.
        epochs: passes over `data` at most.
        batch_size: images a step; the last batch of an epoch may be smaller.
        generator: all randomness: order of the images, augmentation, dropout. The process-wide
            generators are left as they were.
        augment: applied to each batch.
        schedule: factor on the learning rate for each step.
        clip_norm: largest L2 norm of the gradient, applied *after* `backward`.
        after_step: called after each optimiser step; true ends the training.
        stop: called after each epoch; true ends the training.
        progress: told after each step.
        phase: name given to `progress`, in errors and to the checkpoint.
        checkpoints: where the run is kept; finished phases return what they ended with.
        state: everything besides the optimiser that the objective changes, to be kept in the
            checkpoint: networks, further optimisers.
        precision: of the objective; weights and optimiser are float32 always.

    Returns:
        One `Epoch` a pass, in order.

    Raises:
        DivergenceError: the loss of an epoch is NaN or infinite.
        ConfigurationError, OutputError: a checkpoint that is damaged or cannot be written.
    """
    sizes = data.batch_sizes(batch_size)
    steps, rates = len(sizes), [float(group["lr"]) for group in optimizer.param_groups]
    parts = {"optimizer": optimizer, **(state or {})}
    with seeded(data.device, generator):
        run = Resumable(checkpoints, phase, parts, data.device, generator)
        found = run.restore()
        if found is None:
            at, ended = Position.start(0, data.device, generator), False
            history: list[Epoch] = []
        else:
            at, history, ended = found
        while not ended and at.epoch < epochs:
            now = generator.get_state()
            generator.set_state(at.order)
            rows = torch.split(data.order(generator), sizes)
            if at.step:
                generator.set_state(now)
            while at.step < steps and not ended:
                index = rows[at.step]
                done = at.epoch * steps + at.step
                if schedule is not None:
                    factor = schedule(done, epochs * steps)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * factor
                images, labels = data.pixels(index), data.labels[index]
                if augment is not None:
                    images = augment(images, generator)
                with autocast(data.device, precision):
                    value, right = objective(
                        Batch(images, labels, index, at.seen, at.epoch, generator)
                    )
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                ended = after_step is not None and after_step()
                at.step += 1
                at.seen += len(labels)
                at.total += value.detach().float() * len(labels)
                at.hits += right
                progress(phase, done + 1, epochs * steps)
                if run.due and at.step < steps and not ended:
                    run.save(at, history, finished=False)
            record = Epoch(at.epoch + 1, float(at.total) / at.seen, float(at.hits) / at.seen)
            history.append(record)
            if not math.isfinite(record.loss):
                raise DivergenceError(
                    f"{phase} diverged in epoch {at.epoch + 1}: the loss is {record.loss}; "
                    "lower the learning rate or set a gradient clipping norm"
                )
            ended = ended or (stop is not None and stop(record))
            at = Position.start(at.epoch + 1, data.device, generator)
            run.save(at, history, finished=ended or at.epoch >= epochs)
    return history


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a classifier is trained from images: SGD with a schedule, random crops, mirroring.

    Attributes:
        epochs: passes over the images.
        batch_size: images a step.
        lr: largest learning rate.
        momentum, weight_decay, nesterov: of SGD.
        schedule: `one-cycle`, or `steps`: a tenth after 30 % and again after 60 % of the epochs.
        padding: zeros around the image before a random crop, in pixels; 0 for none.
        mirror: mirror each image with probability one half.
        compile: run the network through `torch.compile` (CUDA).
        precision: `auto`, `float32`, or `bfloat16` autocast, which is faster on CPUs with matrix
            units for it (AMX) and slow on others.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    schedule: Schedules = "one-cycle"
    padding: int = 4
    mirror: bool = True
    compile: bool = False
    precision: Precision = "auto"

    @classmethod
    def paper(cls) -> Training:
        """Of the RNP paper, A.2: 200 epochs at 0.1, a tenth after epochs 60 and 120."""
        return cls(epochs=200, lr=0.1, nesterov=False, schedule="steps")

    @classmethod
    def implant(cls) -> Training:
        """For a few epochs that start from a trained model."""
        return cls(epochs=5, lr=0.05)

    def check(self) -> None:
        """Raises `ConfigurationError` for a setting out of its range."""
        for name, low in (("epochs", 1), ("batch_size", 2), ("padding", 0)):
            if getattr(self, name) < low:
                raise ConfigurationError(
                    f"{name} must be at least {low}, got {getattr(self, name)}"
                )
        if not self.lr > 0:
            raise ConfigurationError(f"lr must be positive, got {self.lr}")
        for name, kind in (("schedule", Schedules), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigurationError(
                    f"{name} must be one of {', '.join(get_args(kind))}, "
                    f"got {getattr(self, name)!r}"
                )

    def factor(self, step: int, total: int) -> float:
        """Factor on the learning rate in one step."""
        if self.schedule == "one-cycle":
            return one_cycle(step, total)
        return 0.1 ** sum(step >= share * total for share in (0.3, 0.6))

    def forward(self, model: Classifier) -> Callable[[Tensor], Tensor]:
        """The model, compiled where that is asked for and the model lies on CUDA."""
        compiled = self.compile and model.device.type == "cuda"
        return torch.compile(model) if compiled else model

    def run(
        self,
        model: Classifier,
        data: ImageSet,
        *,
        generator: torch.Generator,
        objective: Objective | None = None,
        after_step: Callable[[], bool] | None = None,
        progress: Progress = silent,
        phase: str = "train",
        checkpoints: Checkpoints | None = None,
        state: Mapping[str, Stateful] | None = None,
        evaluating: bool = False,
    ) -> tuple[Epoch, ...]:
        """Train all weights of `model` in place; it is left in evaluation mode.

        Args:
            objective: cross-entropy on the labels of `data` by default.
            state: networks and optimisers besides the model that the objective changes.
            evaluating: train in evaluation mode: running statistics stay and are used, dropout is
                off.
            generator, after_step, progress, phase, checkpoints: as in `fit`.

        Raises:
            ConfigurationError: a setting out of its range.
            DivergenceError: the loss became NaN or infinite.
        """
        self.check()
        model.settle(data.pixels(slice(0, 2))).laid_out().train(not evaluating)
        parameters = list(model.parameters())
        history = fit(
            objective or classification(self.forward(model)),
            parameters,
            data,
            optimizer=torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov and self.momentum > 0,
                fused=model.device.type == "cuda",
            ),
            epochs=self.epochs,
            batch_size=self.batch_size,
            generator=generator,
            augment=Augmentation(self.padding, self.mirror),
            schedule=self.factor,
            after_step=after_step,
            progress=progress,
            phase=phase,
            checkpoints=checkpoints,
            state={"model": model, **(state or {})},
            precision=self.precision,
        )
        model.eval()
        return tuple(history)
