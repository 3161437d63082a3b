"""Images and labels that come as arrays: tensors, NumPy arrays, `.npz` files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reprune.data.images import ImageSet
from reprune.errors import DataError

Array = Tensor | NDArray[Any]

ROUNDING = 1e-3
"""How far outside [0, 1] pixels may lie that were computed."""

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def as_images(images: Array, labels: Array, class_names: Sequence[str] = ()) -> ImageSet:
    """Check arrays that are in memory already and make an `ImageSet` of them.

    Args:
        images: `(n, c, h, w)`, uint8 in 0..255 or float in [0, 1]; memory may be shared.
        labels: `(n,)`, integers in [0, classes).
        class_names: one name per class, or empty.

    Raises:
        DataError: no images, a wrong shape or type, pixels that are NaN or outside [0, 1], labels
            that are not class indices, or that do not fit `images` or `class_names`.

    Example:
        >>> len(as_images(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])))
        4
    """
    pixels, classes = _tensor(images, "images"), _tensor(labels, "labels")
    shape = tuple(pixels.shape)
    if pixels.ndim != 4:
        raise DataError(f"images must be (n, channels, height, width), got shape {shape}")
    if shape[1] > 4 and shape[3] in (1, 3, 4):
        raise DataError(
            f"images must be (n, channels, height, width), got shape {shape}, which looks like "
            "channels last: pass images.permute(0, 3, 1, 2), for NumPy images.transpose(0, 3, 1, 2)"
        )
    if pixels.numel() == 0:
        raise DataError(f"there are no images: got shape {shape}, expected at least one image")
    if pixels.dtype != torch.uint8:
        if not pixels.is_floating_point():
            raise DataError(
                f"images must be uint8 in 0..255 or float in [0, 1], got {images.dtype}"
            )
        pixels = pixels.float()
        low, high = (float(bound) for bound in pixels.aminmax())
        if low >= -ROUNDING and high <= 1 + ROUNDING:
            pixels = pixels.clamp(0, 1)
        check_pixel_range(pixels)
    classes = _labels(classes, len(pixels)).to(pixels.device)
    names = tuple(class_names)
    if names and int(classes.max()) >= len(names):
        raise DataError(
            f"labels go up to {int(classes.max())} but there are {len(names)} class names; "
            f"expected labels in 0..{len(names) - 1}"
        )
    return ImageSet(pixels.contiguous(), classes, names)


def check_pixel_range(pixels: Tensor) -> None:
    """Float pixels must be numbers in [0, 1].

    Raises:
        DataError: NaN or infinite pixels (with the first images that hold one), or pixels outside
            [0, 1] (with the range that came).
    """
    low, high = (float(bound) for bound in pixels.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = (~pixels.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        raise DataError(
            f"{len(bad)} of {len(pixels)} images hold pixels that are NaN or infinite: "
            f"images {listed(bad)}; remove or repair them"
        )
    if low < 0 or high > 1:
        hint = (
            "pixels in 0..255 must be divided by 255, or passed as uint8"
            if low >= 0
            else "undo the normalisation: mean and std belong to the model"
        )
        raise DataError(
            f"float images must lie in [0, 1], got pixels from {low:g} to {high:g}; {hint}"
        )


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """`images` as `(n, c, h, w)` and `labels` from an `.npz` with `images` `(n, h, w[, c])`.

    Raises:
        DataError: a damaged file, a missing array, an array of Python objects, or a wrong shape.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("images", "labels") if name not in arrays.files]
            if missing:
                raise DataError(
                    f"{path} lacks {' and '.join(missing)}: expected the arrays images (n, h, w, c)"
                    f" and labels (n,), found {listed(arrays.files) or 'nothing'}"
                )
            images, labels = arrays["images"], arrays["labels"]
    except (DataError, PermissionError):
        raise
    except Exception as error:  # a damaged zip raises BadZipFile, zlib.error, EOFError, ...
        if "allow_pickle" in str(error) and "Object arrays" in str(error):
            raise DataError(
                f"{path} holds an array of Python objects, which is not loaded because it can run "
                "code; save images and labels as plain numeric arrays of one shape"
            ) from error
        reason = "it is another kind of file" if "pickle" in str(error) else f"{error}"
        raise DataError(f"{path} cannot be read as .npz, it is damaged: {reason}") from error
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(
            f"images in {path} must be (n, h, w, c) or greyscale (n, h, w), got {images.shape}"
        )
    if images.shape[3] > 4 and images.shape[1] in (1, 3, 4):
        raise DataError(
            f"images in {path} must be (n, h, w, c), got {images.shape}, which looks like channels "
            "first: save images.transpose(0, 2, 3, 1)"
        )
    return _tensor(images.transpose(0, 3, 1, 2), "images"), _tensor(labels, "labels")


def resized(data: ImageSet, size: tuple[int, int]) -> ImageSet:
    """The same images at (h, w), bilinear with antialiasing."""
    if data.shape[1:] == size:
        return data
    uint8 = data.images.dtype == torch.uint8
    images = data.images.new_empty(len(data), data.shape[0], *size)
    for start in range(0, len(data), 512):
        index = slice(start, start + 512)
        small = torch.nn.functional.interpolate(
            data.images[index].float(), size, mode="bilinear", antialias=True
        )
        images[index] = small.round().clamp(0, 255).byte() if uint8 else small.clamp(0, 1)
    return ImageSet(images, data.labels, data.class_names)


def listed(items: Sequence[object], limit: int = 5) -> str:
    """`a, b, c` or, beyond `limit`, `a, b, ... (9 in all)`."""
    text = ", ".join(str(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text}, ... ({len(items)} in all)"


def _tensor(array: Array, what: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if not isinstance(array, np.ndarray):
        raise DataError(
            f"{what} must be a tensor or a NumPy array, got {type(array).__name__}; "
            "convert with torch.as_tensor"
        )
    if array.dtype.kind not in "uif":
        raise DataError(f"{what} must be numbers, got an array of {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # torch knows little about the wider unsigned types
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def _labels(labels: Tensor, count: int) -> Tensor:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        hint = "; for one-hot labels pass labels.argmax(1)" if labels.ndim == 2 else ""
        raise DataError(f"labels must be (n,), got shape {tuple(labels.shape)}{hint}")
    if len(labels) != count:
        raise DataError(f"one label per image expected: {count} images, {len(labels)} labels")
    if labels.dtype not in _INTEGERS:
        raise DataError(f"labels must be integer class indices, got {labels.dtype}")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        rows = (labels < 0).nonzero().flatten().tolist()
        raise DataError(
            f"labels must be class indices from 0, got {int(labels.min())}: rows {listed(rows)}; "
            "remove unlabelled images"
        )
    return labels
