"""Small networks from images to images, for triggers that are learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reprune.errors import ConfigurationError

N = TypeVar("N", bound=nn.Module)


def check_width(width: int) -> None:
    """Raises `ConfigurationError` for a width that a `UNet` cannot have."""
    if width < 4 or width % 4:
        raise ConfigurationError(f"the width must be a multiple of 4, got {width}")


class UNet(nn.Module):
    """An encoder and decoder with skip connections; images of any size, each on its own.

    Every level halves the image and doubles the channels, and back. Group norms do not depend on
    the batch, and the same network does for training and for evaluation.

    Args:
        in_channels, out_channels: of the images.
        width: channels at full size, a multiple of 4.
        depth: how often the image is halved.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int = 16, depth: int = 2
    ) -> None:
        super().__init__()
        self.sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "width": width,
            "depth": depth,
        }
        widths = [width * 2**level for level in range(depth + 1)]
        self.first = _block(in_channels, width)
        self.down = nn.ModuleList(_block(w, 2 * w, stride=2) for w in widths[:-1])
        self.up = nn.ModuleList(_block(3 * w, w) for w in reversed(widths[:-1]))
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """`(n, in, h, w)` to `(n, out, h, w)`, without a final activation."""
        value = self.first(images)
        skipped = []
        for block in self.down:
            skipped.append(value)
            value = block(value)
        for block, skip in zip(self.up, reversed(skipped), strict=True):
            value = nn.functional.interpolate(value, skip.shape[2:])
            value = block(torch.cat([value, skip], 1))
        result: Tensor = self.last(value)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """The weights, on the CPU, apart from those of the network."""
        return {
            name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, value in self.state_dict().items()
        }

    @classmethod
    def restore(cls, sizes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """A network of these `sizes` and weights, not trainable.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: sizes and weights do not fit.
        """
        names = ("in_channels", "out_channels", "width", "depth")
        with torch.device("meta"):  # no memory, and nothing drawn
            network = cls(**{name: int(sizes[name]) for name in names})
        network.load_state_dict(dict(tensors), assign=True)
        return network.requires_grad_(False)

    def frozen(self) -> Self:
        """A copy on the CPU that is not trainable."""
        return type(self).restore(self.sizes, self.tensors())


def _block(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride=stride, padding=1), nn.GroupNorm(4, out), nn.ReLU()
    )


def drawn(make: Callable[[], N], generator: torch.Generator) -> N:
    """A new network whose initial weights come from `generator` alone."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def called_on(network: nn.Module, images: Tensor) -> Tensor:
    """`network(images)` where the images lie; the network stays where it is."""
    weights = {name: value.to(images.device) for name, value in network.state_dict().items()}
    result: Tensor = functional_call(network, weights, (images,))
    return result
