"""Random crop and mirror, one draw per image, through kornia."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reprune.errors import ConfigurationError


@dataclass(frozen=True)
class Augmentation:
    """Zero-padded random crop and horizontal mirror; every image gets its own draw.

    Attributes:
        padding: zeros added to each side before cropping back, in pixels; 0 switches it off.
        mirror: mirror each image with probability one half.
    """

    padding: int = 4
    mirror: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment pixels `(n, c, h, w)`; randomness comes from `generator` alone.

        Raises:
            ConfigurationError: a negative padding.
        """
        if self.padding < 0:
            raise ConfigurationError(f"the padding must be at least 0 pixels, got {self.padding}")
        import kornia.augmentation as K

        steps = []
        if self.padding:
            size = (images.shape[-2], images.shape[-1])
            steps.append(K.RandomCrop(size, padding=self.padding, cropping_mode="slice"))
        if self.mirror:
            steps.append(K.RandomHorizontalFlip(p=0.5))
        if not steps:
            return images
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # kornia draws from the process-wide generator
            torch.default_generator.manual_seed(seed)
            for step in steps:
                images = step(images)
        return images
