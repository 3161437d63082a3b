"""Images with labels: reading, checking, splitting and augmenting them."""

from reprune.data.arrays import as_images
from reprune.data.augment import Augmentation
from reprune.data.checks import check_defence_data, check_model
from reprune.data.images import ImageSet, at_once
from reprune.data.parts import channel_statistics, fingerprint, read_parts
from reprune.data.reading import read_images
from reprune.data.splits import draw, split, take

__all__ = [
    "Augmentation",
    "ImageSet",
    "as_images",
    "at_once",
    "channel_statistics",
    "check_defence_data",
    "check_model",
    "draw",
    "fingerprint",
    "read_images",
    "read_parts",
    "split",
    "take",
]
