"""Triggers as files: `.npz` or RGBA image for stamps, `.safetensors` for learned ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reprune.attacks.dynamic import DynamicTrigger
from reprune.attacks.filter_trigger import FilterTrigger
from reprune.attacks.lira import LiraTrigger
from reprune.attacks.style import StyleTrigger
from reprune.attacks.trigger import LearnedTrigger, Stamp
from reprune.attacks.wanet import WarpTrigger
from reprune.errors import ConfigurationError, DataError
from reprune.files import atomic_file
from reprune.types import Trigger

KINDS: dict[str, type[LearnedTrigger]] = {
    StyleTrigger.kind: StyleTrigger,
    LiraTrigger.kind: LiraTrigger,
    WarpTrigger.kind: WarpTrigger,
    DynamicTrigger.kind: DynamicTrigger,
    FilterTrigger.kind: FilterTrigger,
}
"""Learned triggers by the name in their files."""


def read_trigger(path: str | Path) -> Trigger:
    """Read a trigger: `.npz` with `keep` and `add` (h, w, c or 1), RGBA image, `.safetensors`.

    In an RGBA image, alpha says how much of the image is replaced: `keep = 1 - alpha`,
    `add = alpha * rgb`. A `.safetensors` file is one that `write_trigger` wrote.

    Raises:
        DataError: no such file, none of the formats, another shape, or values out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no trigger file at {path}")
    return _read_learned(path) if path.suffix == ".safetensors" else _read_stamp(path)


def _read_learned(path: Path) -> LearnedTrigger:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind = metadata.get("trigger", "")
        if kind not in KINDS:
            raise DataError(
                f"{path} holds no trigger that is known: got {kind!r}, known are {', '.join(KINDS)}"
            )
        return KINDS[kind].restore(json.loads(metadata["settings"]), tensors)
    except DataError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} is not a trigger, or a damaged one: {error}") from error


def _read_stamp(path: Path) -> Stamp:
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


def write_trigger(trigger: Trigger, path: str | Path) -> None:
    """Write a trigger; `read_trigger` reads it back to the same pixels.

    A `Stamp` becomes `keep` and `add` as (h, w, c) arrays in an `.npz`, a `LearnedTrigger` a
    `.safetensors` file.

    Raises:
        OutputError: no permission, a full disk, or a folder at `path`.
        ConfigurationError: a path with another ending, or a trigger that is a mere function.
    """
    if not isinstance(trigger, Stamp | LearnedTrigger):
        raise ConfigurationError(
            f"only a Stamp or a LearnedTrigger can be written, got {type(trigger).__name__}"
        )
    wanted = Path(trigger_name(trigger)).suffix
    if Path(path).suffix != wanted:
        raise ConfigurationError(f"this trigger is written as {wanted}, got the path {path}")
    with atomic_file(path) as file:
        if isinstance(trigger, Stamp):
            np.savez_compressed(
                file,
                keep=trigger.keep.permute(1, 2, 0).cpu().numpy(),
                add=trigger.add.permute(1, 2, 0).cpu().numpy(),
            )
        else:
            tensors = {name: value.contiguous() for name, value in trigger.tensors().items()}
            settings = json.dumps(trigger.settings())
            file.write_bytes(save(tensors, {"trigger": trigger.kind, "settings": settings}))


def trigger_name(trigger: Trigger) -> str:
    """The name of a trigger's file in a model's folder."""
    return "trigger.npz" if isinstance(trigger, Stamp) else "trigger.safetensors"
