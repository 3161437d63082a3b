"""Reading images as users have them: class folders, Parquet, `.npz`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from reprune.data.arrays import as_images, listed, read_npz, resized
from reprune.data.decoding import decode
from reprune.data.images import ImageSet
from reprune.errors import DataError
from reprune.types import Progress, silent

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
"""Image files that count in a class folder; all others are passed over."""

TRAIN, TEST_NAMES = "train", ("test", "val", "valid", "validation")
"""Folders that are no classes, but parts of a data set."""

JUNK = ("__MACOSX", "__pycache__")
"""Folders that archives and tools leave."""

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


def read_images(
    source: str | Path,
    *,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> ImageSet:
    """Read labelled images from a folder of class folders, a Parquet file or an `.npz` file.

    - **Folder**: one folder per class, sub-folders allowed, hidden files passed over. Folders
      named as in `class_names` get its indices, folders named by integers are those labels, and
      without `class_names` other folders count up in the order of their names.
    - **Parquet** in the Hugging Face image convention, or a folder that holds one such file. Labels
      follow `class_names` where the file's own names are all among them.
    - **`.npz`**: `images` `(n, h, w, c)` or `(n, h, w)`, uint8 or float in [0, 1], and `labels`
      `(n,)`. The channels stay as they are.

    Image files become RGB whatever they are (greyscale, palette, alpha dropped); `ImageSet.grey`
    makes one channel of them.

    Args:
        source: the folder or file.
        size: (h, w) that every image is resized to (bilinear, antialiased); `None` keeps the size.
        class_names: the model's class names in the order of its logits, where they are known.
        progress: told `("read", images done, images)`.

    Returns:
        Images `(n, c, h, w)`, uint8 in 0..255 or (from a float `.npz`) float32 in [0, 1].

    Raises:
        DataError: nothing at `source`, no images, an unknown format, a damaged file, images of
            several sizes without `size`, pixels or labels out of range, unknown class folders.
    """
    source, names = Path(source), tuple(class_names or ())
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise DataError(f"size must be (height, width) in pixels, at least 1, got {size}")
    try:
        if not source.exists():
            raise DataError(f"no such file or folder: {source}")
        if source.is_dir():
            tables = sorted(p for p in source.glob("*.parquet") if not p.name.startswith("."))
            if len(tables) > 1:
                raise DataError(
                    f"{source} holds several Parquet files: {listed([p.name for p in tables])}; "
                    "pass the path of one of them"
                )
            arrays = sorted(p.name for p in source.glob("*.npz") if not tables)
            if arrays and not any(p.is_dir() for p in source.iterdir()):
                raise DataError(f"{source} holds {listed(arrays)}; pass the path of one of them")
            if not tables:
                return _read_folder(source, size, names, progress)
            source = tables[0]
        if source.suffix.lower() == ".parquet":
            return _read_parquet(source, size, names, progress)
        if source.suffix.lower() == ".npz":
            images, labels = read_npz(source)
            data = _named(source, images, labels, names)
            return data if size is None else resized(data, size)
    except PermissionError as error:
        raise DataError(f"no permission to read {error.filename or source}") from error
    raise DataError(
        f"cannot read images from {source}: expected a folder of class folders, a .parquet file or "
        f"an .npz file, got {source.suffix or 'a file without extension'}"
    )


def _named(source: Path, images: Tensor, labels: Tensor, names: Sequence[str]) -> ImageSet:
    """`as_images` whose errors name the file."""
    try:
        return as_images(images, labels, names)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _read_folder(
    root: Path, size: tuple[int, int] | None, names: tuple[str, ...], progress: Progress
) -> ImageSet:
    files, labels, names = folder_files(root, names)
    pixels = decode(files, size=size, name=lambda i: str(files[i]), progress=progress)
    return _named(root, pixels, torch.tensor(labels), names)


def folder_files(
    root: Path, names: tuple[str, ...]
) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """The image files of a folder of class folders, their labels, and the class names.

    Raises:
        DataError: no class folders, unknown ones, or no images in them.
    """
    inside = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    folders = [name for name in inside if name not in JUNK]
    if not folders:
        raise DataError(
            f"{root} holds no class folders; expected {root}/CLASS/image.png, a folder per class"
        )
    index, names = _folder_labels(root, folders, names)
    files: list[Path] = []
    labels: list[int] = []
    others: set[str] = set()
    for folder in sorted(folders, key=lambda name: (index[name], name)):
        images, rest = find_files(root / folder)
        others |= rest
        files += images
        labels += [index[folder]] * len(images)
    if not files:
        seen = f"; found only {listed(sorted(others))}" if others else ""
        raise DataError(
            f"no images in the {len(folders)} class folders of {root}{seen}; "
            f"expected {' '.join(EXTENSIONS)}"
        )
    return files, labels, names


def find_files(folder: Path) -> tuple[list[Path], set[str]]:
    """Every image file below `folder` in a fixed order, and the endings of all other files."""
    found = _files(folder)
    images = [path for path in found if path.suffix.lower() in EXTENSIONS]
    return images, {path.suffix for path in found if path.suffix.lower() not in EXTENSIONS}


def _folder_labels(
    root: Path, folders: list[str], names: tuple[str, ...]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The label of each class folder, and the class names that go with them."""
    if names and set(folders) <= set(names):
        return {folder: names.index(folder) for folder in folders}, names
    if all(folder.isdecimal() for folder in folders):
        index = {folder: int(folder) for folder in folders}
        twins = [f for f in sorted(folders) if list(index.values()).count(index[f]) > 1]
        if twins:
            raise DataError(f"class folders of {root} stand for the same label: {listed(twins)}")
        return index, names
    if len(folders) > 1 and set(folders) <= {TRAIN, *TEST_NAMES}:
        raise DataError(
            f"{root} holds the parts {listed(sorted(folders))} of a data set, not classes: pass "
            f"one of them, such as {root / sorted(folders)[0]}"
        )
    if names:
        unknown = sorted(set(folders) - set(names))
        raise DataError(
            f"class folders of {root} that the model does not know: {listed(unknown)}; its classes "
            f"are {listed(names, 10)}: rename the folders to these names or to their indices from 0"
        )
    folders = sorted(folders)
    return {folder: label for label, folder in enumerate(folders)}, tuple(folders)


def _raise(error: OSError) -> None:
    raise error


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` that is not hidden, in a fixed order."""
    found: list[Path] = []
    for where, subfolders, files in os.walk(folder, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(where, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _read_parquet(
    path: Path, size: tuple[int, int] | None, names: tuple[str, ...], progress: Progress
) -> ImageSet:
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
        image = next((name for name in _IMAGE_COLUMNS if name in found), None)
        label = next((name for name in _LABEL_COLUMNS if name in found), None)
        if image is None or label is None:
            raise DataError(
                f"{path} needs the columns image and label, found {listed(found, 20) or 'none'}"
            )
        table = file.read([image, label])
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(f"{path} cannot be read as Parquet, it is damaged: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path} holds no rows; expected at least one image")
    blobs = _blobs(path, image, table[image])
    labels = table[label]
    if not pa.types.is_integer(labels.type):
        raise DataError(
            f"column {label} of {path} must hold integer class indices, got {labels.type}"
        )
    if labels.null_count:
        row = pc.index(pc.is_null(labels), True).as_py()
        raise DataError(f"column {label} of {path} is empty in row {row}; remove unlabelled rows")
    own = _class_names(table.schema.metadata, label)
    classes = torch.from_numpy(labels.to_numpy().astype(np.int64))
    if names and own and names != own and set(own) <= set(names) and int(classes.min()) >= 0:
        if int(classes.max()) < len(own):
            classes = torch.tensor([names.index(name) for name in own])[classes]
            own = names
    elif not own:
        own = names
    images = decode(blobs, size=size, name=lambda i: f"row {i} of {path}", progress=progress)
    return _named(path, images, classes, own)


def _blobs(path: Path, name: str, column: Any) -> list[bytes]:
    """The encoded images of a column of bytes, or of structs with a field `bytes`."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"column {name} of {path} must be a struct of bytes and path, got {column.type}"
        )
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(
            f"row {row} of {path} has no image bytes; save the data set with its images embedded"
        )
    blobs: list[bytes] = column.to_pylist()
    return blobs


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Class names from Hugging Face's schema metadata; empty where there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
