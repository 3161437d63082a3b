"""Reading images as users have them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from reprune.data.images import ImageSet


def read_images(path: str | Path) -> ImageSet:
    table = pq.read_table(path)
    images = np.stack([
        np.asarray(Image.open(io.BytesIO(x["bytes"])).convert("RGB"))
        for x in table.column("image").to_pylist()
    ])
    labels = torch.tensor(table.column("label").to_pylist())
    meta = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = meta.get("info", {}).get("features", {}).get("label", {}).get("names", [])
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, tuple(names))
