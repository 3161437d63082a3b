"""What a trigger does to images, drawn: clean, triggered, residual times ten (RNP, Figure 6)."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from reprune.attacks import Goal, triggered
from reprune.data import ImageSet, draw
from reprune.errors import DataError
from reprune.types import Trigger

AMPLIFIED = 10
COLUMNS = 8


def preview_rows(
    data: ImageSet, trigger: Trigger, goal: Goal, count: int = COLUMNS
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, the same with the trigger, and their difference times ten.

    Args:
        data: labelled images, grey or RGB; `count` of those that the attack is
            meant for are drawn, the classes as evenly as they allow.
        trigger, goal: the attack.

    Returns:
        Three tensors of pixels `(n, c, h, w)`; the difference is drawn around mid-grey 0.5.

    Raises:
        DataError: no image that the attack is meant for.
    """
    rows = goal.victims(data.labels).nonzero().flatten()
    if not len(rows):
        raise DataError(f"none of the {len(data)} images is one that the attack ({goal}) is for")
    shown = draw(data.subset(rows), count, torch.Generator().manual_seed(0))
    clean, changed = shown.pixels(), triggered(shown, trigger, goal).pixels()
    return clean, changed, (0.5 + AMPLIFIED * (changed - clean)).clamp(0, 1)


def preview(data: ImageSet, trigger: Trigger, goal: Goal, title: str = "") -> bytes:
    """The rows of `preview_rows` as a PNG file.

    Raises:
        DataError: as `preview_rows`, or images that are neither grey nor RGB.
    """
    from matplotlib.figure import Figure

    if data.shape[0] not in (1, 3):
        raise DataError(f"only grey and RGB images can be drawn, got {data.shape[0]} channels")
    rows = preview_rows(data, trigger, goal)
    names = ("clean", "triggered", f"difference ×{AMPLIFIED}")
    count = len(rows[0])
    figure = Figure(figsize=(1.1 * count + 1.2, 3.6), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, images, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(line, images, strict=True):
            picture = image.expand(3, -1, -1) if image.shape[0] == 1 else image
            axis.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    figure.suptitle(title or str(goal), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
