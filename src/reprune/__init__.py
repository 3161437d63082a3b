"""Find and remove backdoors in PyTorch image classifiers with a few hundred clean images.

Example:
    >>> import reprune, torch
    >>> model = reprune.Classifier(network, num_classes=10)  # doctest: +SKIP
    >>> clean = reprune.read_images("clean/")  # doctest: +SKIP
    >>> result = reprune.RNP()(model, clean, generator=torch.Generator())  # doctest: +SKIP
"""

from importlib.metadata import version

from reprune.classifier import Classifier
from reprune.data import ImageSet, as_images, read_images
from reprune.defense import Defense, Purified
from reprune.detection import Scan
from reprune.errors import RepruneError
from reprune.evaluation import evaluate
from reprune.masks import ChannelMask, bake, masked_call
from reprune.models import load_model
from reprune.rnp import RNP
from reprune.sites import find_sites

__version__ = version("reprune")

__all__ = [
    "RNP",
    "ChannelMask",
    "Classifier",
    "Defense",
    "ImageSet",
    "Purified",
    "RepruneError",
    "Scan",
    "as_images",
    "bake",
    "evaluate",
    "find_sites",
    "load_model",
    "masked_call",
    "read_images",
]
