"""Reading images under suspicion, whose labels may be unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reprune.data.arrays import listed
from reprune.data.decoding import decode
from reprune.data.images import ImageSet
from reprune.data.reading import find_files, folder_files, read_images
from reprune.errors import DataError
from reprune.types import Progress, silent


@dataclass(frozen=True)
class Suspects:
    """Images to examine.

    Attributes:
        data: the images; labels are all 0 where they are not known.
        labelled: whether the labels mean something.
        files: where each image is from, relative to the folder; empty for arrays.
    """

    data: ImageSet
    labelled: bool
    files: tuple[str, ...] = ()


def read_suspects(
    source: str | Path,
    *,
    labelled: bool,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Suspects:
    """Read images as `read_images` does; labels may be missing in folders unless `labelled`.

    Without `labelled`, a folder whose pictures lie in it directly, or in sub-folders that are not
    classes of the model, is read whole, sub-folders too, and its labels are unknown.

    Args:
        source: a folder of pictures or of class folders, a Parquet file, or an `.npz` file.
        labelled: whether labels are needed.
        size, class_names, progress: as in `read_images`.

    Raises:
        DataError: as `read_images`.
    """
    root, names = Path(source), tuple(class_names or ())
    if not root.is_dir() or any(root.glob("*.parquet")) or any(root.glob("*.npz")):
        data = read_images(root, size=size, class_names=names, progress=progress)
        return Suspects(data, True)
    try:
        files, labels = _files(root, names, labelled)
        if labels is not None:
            data = read_images(root, size=size, class_names=names, progress=progress)
            return Suspects(data, True, _relative(root, files))
        pixels = decode(files, size=size, name=lambda i: str(files[i]), progress=progress)
    except PermissionError as error:
        raise DataError(f"no permission to read {error.filename or root}") from error
    unknown = torch.zeros(len(files), dtype=torch.int64)
    return Suspects(ImageSet(pixels, unknown), False, _relative(root, files))


def _files(
    root: Path, names: tuple[str, ...], labelled: bool
) -> tuple[list[Path], list[int] | None]:
    """Every picture, with its label where the folder is one of class folders."""
    here = [p for p in root.iterdir() if not p.name.startswith(".")]
    files, others = find_files(root)
    known = set(files)
    loose = [p for p in here if p in known]
    if labelled or not loose:
        try:
            sorted_files, labels, _ = folder_files(root, names)
            return sorted_files, labels
        except DataError:
            if labelled:
                raise
    if not files:
        seen = f"; found only {listed(sorted(others))}" if others else ""
        raise DataError(f"{root} holds no pictures{seen}")
    return files, None


def _relative(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(path.relative_to(root).as_posix() for path in files)
