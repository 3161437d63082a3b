"""Training and test images of one source, and what a classifier must know about them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from reprune.data.images import ImageSet
from reprune.data.reading import TEST_NAMES, TRAIN, read_images
from reprune.data.splits import split
from reprune.errors import DataError
from reprune.types import Progress, silent

HELD_OUT = 0.1
"""Share of the images that is held out for testing where there is no test part."""


def read_parts(
    source: str | Path,
    test: str | Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> tuple[ImageSet, ImageSet]:
    """Training and test images.

    A folder with `train` and `test` (or `val`, `valid`, `validation`), each a folder of class
    folders, a `.parquet` or an `.npz` file, gives these two; one with nothing but `train` gives
    that. Any other source is the training part. Where there is no test part it is `test`, or a
    tenth of the images, drawn with a fixed seed.

    Args:
        source: folder or file.
        test: the test images, if they lie elsewhere.
        size, class_names, progress: as in `read_images`.

    Raises:
        DataError: as `read_images`; parts that differ in image shape or name other classes.
    """
    train, place = Path(source), None if test is None else Path(test)
    if train.is_dir():
        inner, beside = _part(train, (TRAIN,)), place or _part(train, TEST_NAMES)
        if inner is not None and (beside is not None or _alone(inner)):
            train, place = inner, beside
    images = read_images(train, size=size, class_names=class_names, progress=progress)
    if place is None:
        held_out, images = split(images, HELD_OUT, torch.Generator().manual_seed(0))
        return images, held_out
    names = class_names or images.class_names or None
    others = read_images(place, size=size, class_names=names, progress=progress)
    if others.shape != images.shape:
        raise DataError(
            f"training images in {train} have shape {images.shape}, test images in {place} "
            f"{others.shape}; give --image-size to resize both"
        )
    return images, others


def _alone(part: Path) -> bool:
    """Whether nothing is beside it that could be a class as well."""
    others = (path for path in part.parent.iterdir() if path != part)
    return not any(path.is_dir() and not path.name.startswith(".") for path in others)


def _part(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = (folder / (name + ending) for name in names for ending in ("", ".parquet", ".npz"))
    return next((path for path in candidates if path.exists()), None)


def channel_statistics(data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in pixel units, 4 decimals."""
    total = torch.zeros(data.shape[0], dtype=torch.float64)
    squares, count = total.clone(), 0
    for images, _ in data.batches(1000):
        flat = images.double().transpose(0, 1).flatten(1).cpu()
        total += flat.sum(1)
        squares += flat.square().sum(1)
        count += flat.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-4)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def fingerprint(data: ImageSet) -> str:
    """Hexadecimal SHA-256 of images and labels."""
    digest = hashlib.sha256()
    for tensor in (data.images, data.labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
