"""`load_model`: from a folder or a weights file to a `Classifier` that is ready to be examined."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, ModelError, WeightsError
from reprune.models.card import ModelCard, Normalization, read_card
from reprune.models.fitting import infer_num_classes, load_weights, without_prefix
from reprune.models.model_file import build_from_file, split_file_arch
from reprune.models.registry import ARCHITECTURES, build_network, is_known
from reprune.models.weights import EXTENSIONS, RARE, decode_weights, read_file
from reprune.models.zoo import locate


@dataclass(frozen=True)
class LoadedModel:
    """A model as it was found: loading never changes a file.

    Attributes:
        classifier: evaluation mode, float32, CPU; takes pixels in [0, 1].
        card: what `card.json` said; empty without one. `card.extra` is for evaluation only.
        weights_path: the weights file.
        sha256: hexadecimal digest of the weights file's bytes.
        keys: names of the weights, in the file's order.
        prefix: what they all begin with besides the network's own names, such as `module.`.
        arch: the architecture that was built: a name, or `path/to/file.py:function`.
        arch_args: the keyword arguments it was built with.
        notes: remarks that a person should see, such as an unparsed preprocessing text.
    """

    classifier: Classifier
    card: ModelCard
    weights_path: Path
    sha256: str
    keys: tuple[str, ...]
    prefix: str
    arch: str
    arch_args: Mapping[str, Any]
    notes: tuple[str, ...]


def load_model(
    source: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    arch_args: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads a classifier from a folder or a weights file; what is given here beats the card.

    A folder holds `model.safetensors` (or one weights file of another name), and beside it
    `card.json` and `model.py`, both optional; a file's neighbours of these names are used too.
    The architecture is `arch`, else the card's `arch` if that names a known one, else
    `build(num_classes)` of `model.py`. A `model.py` that merely lies there runs only after
    `check_source` has found nothing odd in it; one named by `arch="model.py:build"` runs as it is.

    Args:
        source: folder or weights file, or `zoo:NAME`.
        arch: what `build_network` takes; a relative file is looked up here, then in the folder.
        num_classes: number of logits; else the card's, else read off the last linear layer.
        mean, std: per-channel statistics in pixel units; else the card's.
        arch_args: keyword arguments of the architecture; else the card's, unless `arch` replaces
            the architecture that they belong to.

    Raises:
        WeightsError: no usable weights, or weights that do not fit the architecture.
        ModelError: a bad card, a refused or failing `model.py`, or no architecture known.
        UnknownNameError, MissingDependencyError, ConfigurationError: from `build_network`, or
            `mean` without `std`.
    """
    if num_classes is not None and num_classes < 2:
        raise ConfigurationError(f"a classifier needs at least 2 classes, got {num_classes}")
    weights_path = _find_weights(locate(source))
    folder = weights_path.parent
    card_path, model_py = folder / "card.json", folder / "model.py"
    card = read_card(card_path) if card_path.is_file() else ModelCard()
    mean, std, notes = _preprocessing(card, mean, std, card_path)

    data = read_file(weights_path)
    found = decode_weights(data, weights_path)
    weights = found.weights
    if found.others:
        notes.append(
            f"the file holds other weights, too, which were not taken: {', '.join(found.others)}"
        )
    classes = num_classes or card.num_classes
    if classes is None:
        classes = infer_num_classes(weights, source=str(weights_path))
        notes.append(f"number of classes read off the last layer: {classes}")

    if arch_args is None:
        other = arch is not None and arch != card.arch and is_known(card.arch or "")
        arch_args = {} if other else card.arch_args
    with torch.random.fork_rng(devices=[]):  # initial weights, overwritten below
        network, built = _build(arch, card, model_py, classes, dict(arch_args))
    network.float()
    weights, wrapper = without_prefix(network, weights, source=str(weights_path))
    if wrapper:
        notes.append(f"{wrapper!r} was taken off the names of the weights")
    load_weights(network, weights, source=str(weights_path))
    prefix = found.prefix + wrapper
    classifier = Classifier(network, mean, std, num_classes=classes).eval()
    if card.input_shape is not None:
        _try_out(classifier, card.input_shape, built)
    return LoadedModel(
        classifier=classifier,
        card=card,
        weights_path=weights_path,
        sha256=hashlib.sha256(data).hexdigest(),
        keys=tuple(prefix + key for key in weights),
        prefix=prefix,
        arch=built,
        arch_args=dict(arch_args),
        notes=tuple(notes),
    )


def _find_weights(source: Path) -> Path:
    if not source.exists():
        raise WeightsError(f"there is no file or folder {source}; check the path")
    if not source.is_dir():
        return source
    preferred = source / "model.safetensors"
    if preferred.exists():
        return preferred
    files = sorted(source.iterdir())
    found = [path for path in files if path.suffix.lower() in EXTENSIONS]
    found = found or [path for path in files if path.suffix.lower() in RARE]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found)
    raise WeightsError(
        f"the folder {source} holds {f'several weights files: {names}' if found else 'no weights'}"
        f"; expected model.safetensors or a single {', '.join(EXTENSIONS)} file: "
        "give the file's own path"
    )


def _preprocessing(
    card: ModelCard, mean: Sequence[float] | None, std: Sequence[float] | None, card_path: Path
) -> tuple[Sequence[float] | None, Sequence[float] | None, list[str]]:
    """What was given, else the card's statistics, else none if the card's text says so."""
    if (mean is None) != (std is None):
        raise ConfigurationError("mean and std go together: give both --mean and --std, or neither")
    said = card.preprocessing
    if mean is not None:
        if max(mean) > 1:
            raise ConfigurationError(
                f"wrong preprocessing (mean/std): they are in pixel units, [0, 1], got a mean of "
                f"{max(mean):g}; divide both by 255"
            )
        return mean, std, []
    if isinstance(said, Normalization):
        return said.mean, said.std, []
    if said is None:
        return None, None, ["no preprocessing given: the network takes pixels as they are"]
    if "no mean/std" in said.lower() or said.strip().lower() == "none":
        return None, None, [f"preprocessing, as the card says: {said}"]
    raise ModelError(
        f"{card_path} describes the preprocessing in words that cannot be followed: {said!r}. "
        "Give --mean and --std (0 and 1 for none), or write "
        '{"mean": [...], "std": [...]} in the card'
    )


def _build(
    arch: str | None, card: ModelCard, model_py: Path, classes: int, args: dict[str, Any]
) -> tuple[nn.Module, str]:
    if arch is not None:
        arch = _locate(arch, model_py.parent)
        return build_network(arch, classes, **args), arch
    if card.arch is not None and is_known(card.arch):
        return build_network(card.arch, classes, **args), card.arch
    function = _function_in(card.arch, model_py)
    if model_py.is_file():
        network = build_from_file(model_py, function, classes, args, checked=True)
        return network, f"{model_py}:{function}"
    said = f"card.json says {card.arch!r}, which names none" if card.arch else "no card names one"
    raise ModelError(
        f"the architecture of {model_py.parent} is not known: {said}, and there is no model.py "
        f"with build(num_classes). Give --arch with one of {', '.join(ARCHITECTURES)}, wrn-D-K, "
        "timm:NAME, torchvision:NAME or path/to/file.py:function"
    )


def _function_in(said: str | None, model_py: Path) -> str:
    """The function that a card's `"arch": "model.py:function"` names; `build` otherwise."""
    file = split_file_arch(said) if said else None
    if file is None:
        return "build"
    if str(file[0]) != model_py.name:
        raise ModelError(
            f"the card's arch names the file {file[0]}; only model.py beside the weights is "
            f"considered. Read the file and name it yourself: --arch PATH:{file[1]}"
        )
    return file[1]


def _locate(arch: str, folder: Path) -> str:
    """A file that is not found from here is looked for beside the weights."""
    file = split_file_arch(arch)
    if file is None or file[0].exists() or not (folder / file[0]).exists():
        return arch
    return f"{folder / file[0]}:{file[1]}"


def _try_out(classifier: Classifier, shape: tuple[int, int, int], built: str) -> None:
    """One grey image through the model: finds a wrong shape now and not an hour later."""
    try:
        with torch.inference_mode():
            logits = classifier(torch.full((1, *shape), 0.5))
    except Exception as error:
        raise ModelError(
            f"{built} fails on an image of the card's input_shape {shape}: {error}"
        ) from error
    wanted = (1, classifier.num_classes)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != wanted:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(f"{built} returned {got} for one image, expected logits {wanted}")
