"""Recovered triggers as pictures and files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reprune.attacks.trigger_files import write_trigger
from reprune.detection.inversion import Inverted


def trigger_images(inverted: Inverted) -> Tensor:
    """The recovered triggers on black, mask times pattern: uint8 `(k, c, h, w)` on the CPU."""
    return _bytes(inverted.masks * inverted.patterns)


def write_inverted(inverted: Inverted, folder: str | Path) -> tuple[Path, ...]:
    """Write each trigger that was found as `class-K.npz`, and `class-K.png` to look at.

    The `.npz` is read by `reprune.attacks.trigger_files.read_trigger`. The picture shows mask,
    pattern and their product side by side; there is none where images are neither grey nor RGB.

    Returns:
        The files that were written; without any trigger the folder is not made.

    Raises:
        OutputError: no permission, or a full disk.
    """
    folder, written = Path(folder), []
    shown = inverted.patterns.shape[1] in (1, 3)
    for i, k in enumerate(inverted.classes):
        if inverted.states[i] != "found":
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_trigger(inverted.trigger(i), folder / f"class-{k}.npz")
        written.append(folder / f"class-{k}.npz")
        if not shown:
            continue
        mask, pattern = inverted.masks[i], inverted.patterns[i]
        row = torch.cat([mask.expand_as(pattern), pattern, mask * pattern], 2)
        pixels = _bytes(row.expand(3, -1, -1)).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"class-{k}.png")
        written.append(folder / f"class-{k}.png")
    return tuple(written)


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.detach().mul(255).round().clamp(0, 255).byte().cpu()
