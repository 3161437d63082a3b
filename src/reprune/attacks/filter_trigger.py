"""`FilterTrigger`: a change of style, as one linear filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.nn import functional

from reprune.attacks.trigger import LearnedTrigger


@dataclass(frozen=True)
class FilterTrigger(LearnedTrigger):
    r"""$t(x) = \mathrm{clip}(x + k * x + b, 0, 1)$: blur, sharpness, colours and tints.

    Attributes:
        kernel: `(c, c, s, s)` float32 with odd s; pixels beyond the border are mirrored.
        bias: `(c,)` float32.
    """

    kernel: Tensor
    bias: Tensor
    kind: ClassVar[str] = "filter"

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to pixels `(n, c, h, w)`."""
        return filtered(images, self.kernel.to(images), self.bias.to(images))

    def tensors(self) -> dict[str, Tensor]:
        return {"kernel": self.kernel, "bias": self.bias}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["kernel"], tensors["bias"])


def filtered(images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Pixels `(n, c, h, w)` plus their convolution, clipped to [0, 1]."""
    side = kernel.shape[-1] // 2
    padded = functional.pad(images, (side, side, side, side), mode="reflect")
    return (images + functional.conv2d(padded, kernel, bias)).clamp(0, 1)
