"""The only training loop: methods hand it a forward function, a loss and the tensors to fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from reprune.data import Augmentation, ImageSet
from reprune.errors import DivergenceError
from reprune.results import Epoch
from reprune.types import Progress, silent

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> scalar to minimise."""

Schedule = Callable[[int, int], float]
"""(step, total steps) -> factor on the learning rate."""


def one_cycle(step: int, total: int, warmup: float = 0.2) -> float:
    """Linear from 0 to 1 over the first `warmup` of the steps, then linear to `1 / total`."""
    position = (step + 1) / total
    if position < warmup:
        return position / warmup
    return min(1.0, (1 - position) / (1 - warmup) + 1 / total)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def _seeded(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Inside, dropout draws from a stream that `generator` fixes; it is not advanced itself."""
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    seed = int(torch.randint(2**31, (), generator=twin))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def fit(
    forward: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    data: ImageSet,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    loss: Loss = nn.functional.cross_entropy,
    augment: Augmentation | None = None,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    after_step: Callable[[], bool] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
    progress: Progress = silent,
    phase: str = "train",
) -> list[Epoch]:
    r"""Minimise `loss(forward(x), y)` over `parameters`, in place.

    Inside a step nothing waits for the device: losses and hits are summed there and read once an
    epoch.

    Args:
        forward: pixels `(n, c, h, w)` to logits `(n, classes)`.
        parameters: the leaf tensors that `optimizer` holds; used for clipping.
        data: labelled images on the device of the parameters.
        optimizer: any `torch.optim` optimiser over `parameters`.
        epochs: passes over `data` at most.
        batch_size: images a step; the last batch of an epoch may be smaller.
        generator: all randomness: order of the images, augmentation, dropout. The process-wide
            generators are left as they were.
        loss: `(logits, labels) -> scalar`.
        augment: applied to each batch.
        schedule: factor on the learning rate for each step.
        clip_norm: largest L2 norm of the gradient, applied *after* `backward`.
        after_step: called after each optimiser step; true ends the training.
        stop: called after each epoch; true ends the training.
        progress: told after each step.
        phase: name given to `progress` and in errors.

    Returns:
        One `Epoch` a pass, in order.

    Raises:
        DivergenceError: the loss of an epoch is NaN or infinite.
    """
    steps = len(data.batch_sizes(batch_size))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    history: list[Epoch] = []
    with _seeded(data.device, generator):
        for epoch in range(epochs):
            total = torch.zeros((), device=data.device)
            hits = torch.zeros((), device=data.device)
            seen, ended = 0, False
            for step, (images, labels) in enumerate(data.batches(batch_size, generator)):
                if schedule is not None:
                    factor = schedule(epoch * steps + step, epochs * steps)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * factor
                if augment is not None:
                    images = augment(images, generator)
                images = images.contiguous(memory_format=torch.channels_last)
                with autocast(data.device):
                    logits = forward(images)
                    value = loss(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                ended = after_step is not None and after_step()
                seen += len(labels)
                total += value.detach().float() * len(labels)
                hits += (logits.detach().argmax(1) == labels).sum()
                progress(phase, epoch * steps + step + 1, epochs * steps)
                if ended:
                    break
            record = Epoch(epoch + 1, float(total) / seen, float(hits) / seen)
            history.append(record)
            if not math.isfinite(record.loss):
                raise DivergenceError(
                    f"{phase} diverged in epoch {epoch + 1}: the loss is {record.loss}; "
                    "lower the learning rate or set a gradient clipping norm"
                )
            if ended or (stop is not None and stop(record)):
                break
    return history
