"""`Classifier`: a network together with its preprocessing. Takes pixels in [0, 1]."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reprune.errors import ConfigurationError, ModelError

CUT_OFF = (
    "no gradient passes through the network; remove torch.no_grad, torch.inference_mode and "
    "detach from its forward"
)
"""What errors say of such a network."""


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
    layout: torch.memory_format | None

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
        self.layout = None
        self.network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
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

    @property
    def channels(self) -> int | None:
        """Of the images that it takes, by its first convolution; `None` where that is not known."""
        if self.mean.shape[1] > 1:
            return self.mean.shape[1]
        convolutions = (m for m in self.network.modules() if isinstance(m, nn.Conv2d))
        first = next(convolutions, None)
        return None if first is None else first.in_channels

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels to the network's input, in its memory layout where that is known.

        Never the pixels themselves, for networks may change their input in place.
        """
        if self.layout is not None:
            images = images.contiguous(memory_format=self.layout)
        return (images - self.mean) / self.std if self.normalizes else images.clone()

    def forward(self, images: Tensor) -> Tensor:
        return self.first(self.network(self.normalize(images)))

    def first(self, outputs: Any) -> Tensor:
        """The logits of a network that returns those of auxiliary heads, too, while it trains."""
        several = isinstance(outputs, tuple | list) and self.network.training
        logits: Tensor = outputs[0] if several else outputs
        return logits

    def settle(self, images: Tensor) -> Classifier:
        """The model itself, once it is known which memory layout its network stands.

        Channels last is the faster one; networks that flatten maps by `view` fail in it.

        Args:
            images: one or more, `(n, c, h, w)`.
        """
        if self.layout is None:
            self.layout = self._fastest(images[:2].to(self.device))
        return self

    def _fastest(self, images: Tensor) -> torch.memory_format:
        if self.device.type == "cpu" and any(map(_breaks, self.modules())):
            return torch.contiguous_format
        try:
            twin = self.clone().eval()
            twin.layout = torch.channels_last
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                twin.laid_out()(images)
        except Exception:  # what is wrong with it otherwise, the other layout will show
            return torch.contiguous_format
        return torch.channels_last

    def laid_out(self) -> Classifier:
        """The model itself, its convolutions' weights in the layout, where known, in place."""
        for parameter in self.parameters():
            if parameter.ndim == 4 and self.layout is not None:
                parameter.data = parameter.data.contiguous(memory_format=self.layout)
        return self

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


def _breaks(module: nn.Module) -> bool:
    """Whether training the layer with channels last corrupts memory on some CPUs (oneDNN 6035)."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 8
    )
