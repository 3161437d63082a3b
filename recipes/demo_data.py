"""Choose the images that ship with `reprune demo`: rows of CIFAR-10, their bytes untouched.

    python recipes/demo_data.py --data DIR --output DIR [--train N]

Writes `clean.parquet` (500 training images) and `test.parquet` (1,000 test images), class shares
kept, in the Hugging Face image convention; with `--train`, only `train.parquet` with N training
images (the tests use 4,000).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch

from reprune.data import ImageSet, draw


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parts = [("train", "clean", 500), ("test", "test", 1000)]
    for source, name, size in [("train", "train", args.train)] if args.train else parts:
        table = pq.read_table(args.data / f"{source}.parquet")
        labels = torch.tensor(table.column("label").to_pylist())
        rows = ImageSet(torch.arange(len(labels)).float().view(-1, 1, 1, 1), labels)
        chosen = draw(rows, size, torch.Generator().manual_seed(0)).images.long().flatten()
        pq.write_table(table.take(chosen.tolist()), args.output / f"{name}.parquet")


if __name__ == "__main__":
    main()
