"""Architectures for small images, and models loaded from files that strangers wrote."""

from reprune.models.card import ModelCard, read_card
from reprune.models.fitting import infer_num_classes, load_weights
from reprune.models.loading import LoadedModel, load_model
from reprune.models.registry import ARCHITECTURES, build_network, model_file, portable_arch
from reprune.models.weights import read_weights, save_weights
from reprune.models.zoo import locate, zoo_model, zoo_models

__all__ = [
    "ARCHITECTURES",
    "LoadedModel",
    "ModelCard",
    "build_network",
    "infer_num_classes",
    "load_model",
    "load_weights",
    "locate",
    "model_file",
    "portable_arch",
    "read_card",
    "read_weights",
    "save_weights",
    "zoo_model",
    "zoo_models",
]
