"""Images with labels: reading, splitting and augmenting them."""

from reprune.data.augment import Augmentation
from reprune.data.images import ImageSet
from reprune.data.reading import read_images
from reprune.data.splits import draw, split

__all__ = ["Augmentation", "ImageSet", "draw", "read_images", "split"]
