"""Fixed triggers: `x -> clip(x * keep + add, 0, 1)`, and their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reprune.errors import ConfigurationError, DataError
from reprune.files import atomic_file


@dataclass(frozen=True)
class Stamp:
    r"""A fixed trigger in pixel space: `t(x) = clip(x * keep + add, 0, 1)`.

    A patch keeps 0 of the pixels it covers, a blend keeps `1 - alpha` everywhere, an added
    pattern keeps 1.

    Attributes:
        keep: `(c, h, w)` float32 in [0, 1].
        add: `(c, h, w)` float32 in [-1, 1].
    """

    keep: Tensor
    add: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Apply to pixels `(n, c, h, w)`.

        Raises:
            DataError: images of another size than the trigger.
        """
        if images.shape[1:] != self.add.shape:
            raise DataError(
                f"the trigger is made for images of shape {tuple(self.add.shape)}, "
                f"got {tuple(images.shape[1:])}"
            )
        keep, add = self.keep.to(images.device), self.add.to(images.device)
        return (images * keep + add).clamp(0, 1)


def read_trigger(path: str | Path) -> Stamp:
    """Read a trigger: `.npz` with `keep` and `add` (h, w, c or 1), or an RGBA image.

    In an RGBA image, alpha says how much of the image is replaced: `keep = 1 - alpha`,
    `add = alpha * rgb`.

    Raises:
        DataError: no such file, none of the two formats, another shape, or values out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no trigger file at {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                missing = {"keep", "add"} - set(arrays.files)
                if missing:
                    raise DataError(
                        f"{path} must hold the arrays keep and add; it holds {arrays.files}"
                    )
                keep, add = (
                    torch.from_numpy(arrays[name].astype(np.float32)) for name in ("keep", "add")
                )
        else:
            with Image.open(path) as image:
                if image.mode != "RGBA":
                    raise DataError(
                        f"{path} is a {image.mode} image; a trigger image needs an alpha "
                        "channel (RGBA) that says where it covers the picture"
                    )
                rgba = torch.from_numpy(np.asarray(image).astype(np.float32) / 255)
            alpha = rgba[..., 3:]
            keep, add = (1 - alpha).expand(*alpha.shape[:2], 3), alpha * rgba[..., :3]
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} is not a trigger: expected .npz (keep, add) or an RGBA image ({error})"
        ) from error
    return _checked(path, keep, add)


def _checked(path: Path, keep: Tensor, add: Tensor) -> Stamp:
    """Arrays `(h, w, c)` from a file as a `Stamp`."""
    if keep.ndim != 3 or add.ndim != 3 or keep.shape[:2] != add.shape[:2]:
        raise DataError(
            f"keep and add in {path} must both be (h, w, c), got {tuple(keep.shape)} and "
            f"{tuple(add.shape)}"
        )
    for name, array, low in (("keep", keep, 0), ("add", add, -1)):
        if not ((array >= low) & (array <= 1)).all():  # false for NaN too
            raise DataError(
                f"{name} in {path} must lie in [{low}, 1], got {float(array.min()):g} to "
                f"{float(array.max()):g}; triggers are in pixel units, 0..1 and not 0..255"
            )
    channels = max(keep.shape[2], add.shape[2])
    if not {keep.shape[2], add.shape[2]} <= {1, channels}:
        raise DataError(
            f"keep and add in {path} need the same number of channels, or 1, got {keep.shape[2]} "
            f"and {add.shape[2]}"
        )
    keep, add = (array.expand(-1, -1, channels).permute(2, 0, 1) for array in (keep, add))
    return Stamp(keep.contiguous(), add.contiguous())


def write_trigger(trigger: Stamp, path: str | Path) -> None:
    """Write `keep` and `add` as (h, w, c) arrays into an `.npz`; `read_trigger` reads it back.

    Raises:
        OutputError: no permission, a full disk, or a folder at `path`.
        ConfigurationError: a path that does not end in `.npz`.
    """
    if Path(path).suffix != ".npz":
        raise ConfigurationError(f"a trigger is written as .npz, got the path {path}")
    with atomic_file(path) as file:
        np.savez_compressed(
            file,
            keep=trigger.keep.permute(1, 2, 0).cpu().numpy(),
            add=trigger.add.permute(1, 2, 0).cpu().numpy(),
        )
