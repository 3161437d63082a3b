"""Recovered triggers as text in a record: a small PNG with transparency."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from reprune.attacks import Stamp


def encoded(stamp: Stamp) -> str | None:
    """A trigger as a base64 PNG of 8 bits a channel: colour, and opacity for what it covers.

    The opacity is the mean over the channels. `None` for images that are not RGB.
    """
    if stamp.add.shape[0] != 3:
        return None
    alpha = (1 - stamp.keep.mean(0, keepdim=True)).clamp(0, 1)
    colour = (stamp.add / alpha.clamp_min(1e-6)).clamp(0, 1)
    pixels = torch.cat([colour, alpha]).mul(255).round().byte().permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> Stamp:
    """The trigger of `encoded`, up to 8 bits."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    colour, alpha = pixels[:3], pixels[3:]
    return Stamp((1 - alpha).expand(3, -1, -1).clone(), colour * alpha)
