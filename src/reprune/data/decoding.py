"""Decoding many image files into one uint8 tensor, on all cores."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reprune.errors import DataError
from reprune.types import Progress, silent

_CHUNK = 256
_LISTED = 5
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}
_EIGHT_BIT_MODES |= {"CMYK", "YCbCr", "LAB", "HSV"}


def decode(
    files: Sequence[Path | bytes],
    *,
    size: tuple[int, int] | None = None,
    name: Callable[[int], str],
    progress: Progress = silent,
) -> Tensor:
    """Decode image files to RGB pixels `(n, 3, h, w)`, uint8 in 0..255.

    Args:
        files: paths, or the bytes of image files; at least one.
        size: (h, w) that every image is resized to (bilinear, antialiased); `None` asks for images
            of one size.
        name: what to call image i in a message.
        progress: told `("read", images done, images)`.

    Raises:
        DataError: a damaged image, more than 8 bits per channel, or several sizes without `size`.
    """
    height, width = size or _open(files[0], name(0)).shape[:2]
    images = np.empty((len(files), 3, height, width), np.uint8)

    def decode_chunk(start: int) -> list[tuple[int, tuple[int, ...]]]:
        misfits = []
        for i in range(start, min(start + _CHUNK, len(files))):
            pixels = _open(files[i], name(i), size)
            if pixels.shape[:2] == (height, width):
                images[i] = pixels.transpose(2, 0, 1)
            else:
                misfits.append((i, pixels.shape))
        return misfits

    misfits: list[tuple[int, tuple[int, ...]]] = []
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for chunk, found in enumerate(pool.map(decode_chunk, range(0, len(files), _CHUNK))):
            misfits += found
            if len(misfits) >= _LISTED - 1:
                break
            progress("read", min((chunk + 1) * _CHUNK, len(files)), len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    if misfits:
        sizes = [(0, (height, width)), *misfits][:_LISTED]
        listing = ", ".join(f"{name(i)} is {shape[0]}x{shape[1]}" for i, shape in sizes)
        raise DataError(
            f"all images must have one size (height x width), got several: {listing}; "
            "pass size=(h, w) or --image-size to resize them"
        )
    return torch.from_numpy(images)


def _open(file: Path | bytes, name: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """One image as RGB `(h, w, 3)`."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise DataError(
                    f"{name} has pixels of mode {image.mode}; expected 8 bits per channel: "
                    "convert it to an 8-bit image first"
                )
            rgb = image.convert("RGB")
            if size is not None and rgb.size != size[::-1]:
                rgb = rgb.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise nearly every type on a damaged file
        raise DataError(
            f"{name} cannot be read as an image ({type(error).__name__}: {error}); "
            "the file is damaged or no image: replace or remove it"
        ) from error
