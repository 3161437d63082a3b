"""Architectures by name: built in, from timm or torchvision, or from the user's own file."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from reprune.errors import ConfigurationError, MissingDependencyError, UnknownNameError
from reprune.models.efficientnet import efficientnetb0
from reprune.models.mobilenet import mobilenetv2
from reprune.models.model_file import build_from_file, split_file_arch
from reprune.models.preactresnet import preactresnet18
from reprune.models.resnet import resnet18, resnet34
from reprune.models.vgg import vgg16, vgg19
from reprune.models.wrn import wrn

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "preactresnet18": preactresnet18,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "mobilenetv2": mobilenetv2,
    "efficientnetb0": efficientnetb0,
    "wrn-16-1": partial(wrn, 16, 1),
    "wrn-28-10": partial(wrn, 28, 10),
}
"""Built-in architectures for images of about 32 pixels; any other `wrn-D-K` works too."""

_WRN = re.compile(r"wrn-(\d+)-(\d+)")
_DOWNLOADS = re.compile(r"pretrained|weights|checkpoint|cache_dir")
_HARMLESS = ("init_weights",)  # of GoogLeNet and Inception: whether to draw them at random


def is_known(arch: str) -> bool:
    """Whether `arch` names an architecture without running a file: built in, timm, torchvision."""
    return (
        arch in ARCHITECTURES
        or _WRN.fullmatch(arch) is not None
        or arch.startswith(("timm:", "torchvision:"))
    )


def model_file(arch: str) -> Path | None:
    """The file that an architecture is built from; `None` for one that has a name."""
    file = None if is_known(arch) else split_file_arch(arch)
    return None if file is None else file[0]


def portable_arch(arch: str) -> str:
    """`arch` for a card that lies beside a copy of `model_file(arch)` named `model.py`."""
    file = None if is_known(arch) else split_file_arch(arch)
    return arch if file is None else f"model.py:{file[1]}"


def build_network(arch: str, num_classes: int, **arch_args: Any) -> nn.Module:
    """Builds a randomly initialised network that maps `(n, c, h, w)` to logits `(n, num_classes)`.

    `arch` is a key of `ARCHITECTURES`, any `wrn-D-K`, `timm:NAME`, `torchvision:NAME`, or
    `path/to/file.py:function`. Nothing is ever downloaded. A named file is run as it is: only name
    files that you have read.

    Raises:
        UnknownNameError: no such architecture; the message lists the known ones.
        MissingDependencyError: timm or torchvision is needed and not installed.
        ConfigurationError: arguments that the architecture does not take, or that would download.
        ModelError: the file cannot be run or does not return a module.

    Example:
        >>> import torch
        >>> build_network("resnet18", 10, width=8)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    file = split_file_arch(arch)
    if file is not None:
        return build_from_file(*file, num_classes, arch_args, checked=False)
    loads = [key for key in arch_args if _DOWNLOADS.search(key) and key not in _HARMLESS]
    if loads:
        raise ConfigurationError(
            f"architecture argument {', '.join(loads)} would load other weights; "
            "architectures are built empty and filled from the model's own file: leave it out"
        )
    builder = _builder(arch)
    try:
        return builder(num_classes=num_classes, **arch_args)
    except ConfigurationError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(
            f"{k}={v!r}" for k, v in {"num_classes": num_classes, **arch_args}.items()
        )
        raise ConfigurationError(
            f"{arch} cannot be built with {given}: {error}. "
            f"It takes {', '.join(inspect.signature(builder).parameters)}"
        ) from error


def _builder(arch: str) -> Callable[..., nn.Module]:
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    wide = _WRN.fullmatch(arch)
    if wide:
        depth, factor = int(wide[1]), int(wide[2])
        return partial(wrn, depth, factor)
    library, _, name = arch.partition(":")
    if library == "timm":
        return _timm(name)
    if library == "torchvision":
        return _torchvision(name)
    raise UnknownNameError(
        f"unknown architecture {arch!r}{_close(arch, ARCHITECTURES)}; known are "
        f"{', '.join(ARCHITECTURES)}, wrn-D-K, timm:NAME, torchvision:NAME "
        "and path/to/file.py:function"
    )


def _timm(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise _missing("timm") from error
    if ":" in name or not timm.is_model(name):  # "hf-hub:..." would reach for the net
        raise UnknownNameError(
            f"timm {timm.__version__} has no model {name!r}{_close(name, timm.list_models())}; "
            "timm.list_models() lists its models"
        )

    def build(num_classes: int, **arch_args: Any) -> nn.Module:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, **arch_args
        )
        return network

    return build


def _torchvision(name: str) -> Callable[..., nn.Module]:
    try:
        from torchvision import models
    except ImportError as error:
        raise _missing("torchvision") from error
    known: list[str] = models.list_models(module=models)
    if name not in known:
        raise UnknownNameError(
            f"torchvision has no classifier {name!r}{_close(name, known)}; known are "
            f"{', '.join(known)}"
        )

    def build(num_classes: int, **arch_args: Any) -> nn.Module:
        network: nn.Module = models.get_model(
            name, weights=None, num_classes=num_classes, **arch_args
        )
        return network

    return build


def _missing(library: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{library} architectures need {library}, which is not installed: "
        'pip install "reprune[vision]"'
    )


def _close(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
