"""`ImageSet`: images and labels in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reprune.errors import DataError

LARGE = 64 * 64
"""Pixels of an image from which fewer are taken at once."""


def at_once(count: int, shape: Sequence[int]) -> int:
    """Images to take in one pass: `count`, or fewer of a shape `(c, h, w)` above 64 x 64 pixels."""
    return max(1, min(count, count * LARGE // (shape[1] * shape[2])))


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, uint8 or float pixels.

    Attributes:
        images: `(n, c, h, w)`, uint8 in 0..255 or float32 in [0, 1].
        labels: `(n,)`, int64 class indices.
        class_names: one name per class, or empty where the source does not say.

    Raises:
        DataError: shapes or types that do not fit together.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise DataError(f"images must be (n, c, h, w), got shape {tuple(self.images.shape)}")
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"images must be uint8 or float32, got {self.images.dtype}")
        if self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"one label per image expected: {len(self.images)} images, "
                f"labels of shape {tuple(self.labels.shape)}"
            )
        if self.labels.dtype != torch.int64:
            raise DataError(f"labels must be int64 class indices, got {self.labels.dtype}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def num_classes(self) -> int:
        """The number of class names; without names the largest label and one."""
        return len(self.class_names) or int(self.labels.max()) + 1

    @property
    def device(self) -> torch.device:
        return self.images.device

    def pixels(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """The images at `indices` as float32 in [0, 1]."""
        images = self.images[indices]
        return images.float().div_(255) if images.dtype == torch.uint8 else images

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return ImageSet(self.images[index], self.labels[index], self.class_names)

    def grey(self) -> ImageSet:
        """The images in one channel: that of grey ones, of others the luma (ITU-R BT.601).

        Raises:
            DataError: neither one nor three channels.
        """
        if self.shape[0] == 1:
            return self
        if self.shape[0] != 3:
            raise DataError(f"images of 1 or 3 channels can become grey, got {self.shape[0]}")
        weights = torch.tensor([0.299, 0.587, 0.114], device=self.device).view(3, 1, 1)
        luma = (self.images * weights).sum(1, keepdim=True)
        if self.images.dtype == torch.uint8:
            luma = luma.round().to(torch.uint8)
        same = (self.images == self.images[:, :1]).all(1, keepdim=True)
        return replace(self, images=torch.where(same, self.images[:, :1], luma))

    def to(self, device: torch.device | str) -> ImageSet:
        """The same images on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names)

    def batch_sizes(self, size: int) -> list[int]:
        """Sizes of the batches that `batches` gives."""
        sizes = [size] * (len(self) // size) + [len(self) % size] * (len(self) % size > 0)
        if len(sizes) > 1 and sizes[-1] == 1 < size:
            sizes[-2:] = [size + 1]
        return sizes or [0]

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, labels) in batches of `size`; shuffled where a CPU `generator` is given.

        A last batch of a single image joins the one before: batch norm cannot train on it.
        """
        for index in torch.split(self.order(generator), self.batch_sizes(size)):
            yield self.pixels(index), self.labels[index]

    def order(self, generator: torch.Generator | None = None) -> Tensor:
        """The rows as they stand, or in an order drawn from a CPU `generator`."""
        if generator is None:
            return torch.arange(len(self), device=self.device)
        return torch.randperm(len(self), generator=generator).to(self.device)
