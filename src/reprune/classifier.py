"""`Classifier`: a network together with its preprocessing. Takes pixels in [0, 1]."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reprune.errors import ConfigurationError, ModelError


class Classifier(nn.Module):
    """A network that takes pixels: `logits = network((images - mean) / std)`.

    Everything in this package outside of this class speaks pixels (float32, `(n, c, h, w)`,
    range [0, 1]); normalisation belongs to the model because every budget and every trigger
    lives in pixel space.

    Args:
        network: any module mapping normalised images `(n, c, h, w)` to logits `(n, classes)`.
        mean, std: per-channel statistics in pixel units, length `c`; `None` means that the network
            takes pixels as they are.
        num_classes: number of logits.

    Raises:
        ConfigurationError: fewer than two classes, or a std that is not positive.

    Example:
        >>> model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), num_classes=3)
        >>> model(torch.rand(5, 3, 2, 2)).shape
        torch.Size([5, 3])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        num_classes: int,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigurationError(f"a classifier needs at least 2 classes, got {num_classes}")
        mean = (0.0,) if mean is None else mean
        std = (1.0,) if std is None else std
        if any(not s > 0 for s in std):
            raise ConfigurationError(f"std must be positive in every channel, got {list(std)}")
        if len(mean) != len(std):
            raise ConfigurationError(
                f"mean and std need the same length, got {len(mean)} and {len(std)}"
            )
        self.network = network
        self.num_classes = num_classes
        self.normalizes = any(m != 0 for m in mean) or any(s != 1 for s in std)
        place = next(iter((*network.parameters(), *network.buffers())), torch.empty(0)).device
        for name, value in (("mean", mean), ("std", std)):
            tensor = torch.tensor(value, device=place).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.mean.device

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels to the network's input."""
        return (images - self.mean) / self.std if self.normalizes else images

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits

    def clone(self) -> Classifier:
        """An independent copy with every parameter trainable: what the phases work on.

        Weights that a hook of `torch.nn.utils` computes anew in each call are copied as values.

        Raises:
            ModelError: the network cannot be copied (it holds locks, open files, a graph).
        """
        computed = {
            id(value): value.detach().clone()
            for module in self.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }
        try:
            twin = copy.deepcopy(self, computed)
        except (RuntimeError, TypeError) as error:
            raise ModelError(f"the network cannot be copied: {error}") from error
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return twin

    @contextmanager
    def still(self) -> Iterator[Classifier]:
        """As `evaluating`, and no weight takes a gradient; what did does again afterwards."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            with self.evaluating():
                yield self
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    @contextmanager
    def evaluating(self) -> Iterator[Classifier]:
        """Evaluation mode inside, every submodule's own mode restored afterwards."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield self
        finally:
            for module, training in modes.items():
                module.training = training
