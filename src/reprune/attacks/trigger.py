"""Triggers: pure functions on pixels, fixed stamps and learned ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from reprune.errors import DataError


@dataclass(frozen=True)
class Stamp:
    r"""A fixed trigger in pixel space: `t(x) = clip(x * keep + add, 0, 1)`.

    A patch keeps 0 of the pixels it covers, a blend keeps `1 - alpha` everywhere, an added
    pattern keeps 1.

    Attributes:
        keep: `(c, h, w)` float32 in [0, 1].
        add: `(c, h, w)` float32 in [-1, 1].
    """

    keep: Tensor
    add: Tensor

    @classmethod
    def patch(cls, mask: Tensor, pattern: Tensor) -> Self:
        """`x -> (1 - mask) x + mask pattern`; the mask is broadcast to the pattern `(c, h, w)`."""
        mask = mask.expand_as(pattern)
        return cls(1 - mask, mask * pattern)

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to pixels `(n, c, h, w)`.

        Raises:
            DataError: images of another size than the trigger.
        """
        if images.shape[1:] != self.add.shape:
            raise DataError(
                f"the trigger is made for images of shape {tuple(self.add.shape)}, "
                f"got {tuple(images.shape[1:])}"
            )
        keep, add = self.keep.to(images.device), self.add.to(images.device)
        return (images * keep + add).clamp(0, 1)


class LearnedTrigger(ABC):
    """A trigger that is more than a stamp: a warp, or a network. Kept as tensors and settings.

    Calling it with pixels `(n, c, h, w)` on any device gives pixels of the same shape in [0, 1];
    the same pixels give the same result, alone or in a batch.
    """

    kind: ClassVar[str]
    """Name in the file."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What was learned or drawn, on the CPU, float32."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain data for JSON that `restore` needs besides the tensors."""

    @classmethod
    @abstractmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The trigger that gave these settings and tensors."""
