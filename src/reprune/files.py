"""Outputs that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reprune.errors import OutputError, RepruneError

MANIFEST = ".reprune-files"
"""Lists, in a folder made by `atomic_directory`, the files that may be replaced."""

_DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("No space left on device", "unexpected pos")
"""What safetensors, Arrow and `torch.save` leave of the error when the disk is full."""

_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling folder to write into, which becomes `path` if the block succeeds.

    A folder that is there already is replaced if it is empty or holds nothing but the files of an
    earlier `atomic_directory`. After any exception, `KeyboardInterrupt` too, `path` is as before.

    Raises:
        OutputError: `path` is a file or holds files of somebody else; no permission; a full disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as tmp, atomic_directory(f"{tmp}/out") as folder:
        ...     _ = (folder / "report.json").write_text("{}")
    """
    target = _absolute(path)
    temporary = _sibling(target)
    try:
        with _explained(target, temporary):
            _check_replaceable(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            files = _files(temporary)
            (temporary / MANIFEST).write_text("".join(f"{name}\n" for name in files), "utf-8")
            _check_replaceable(target)  # once more: the block may have taken hours
            _replace(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary sibling file to write, which becomes `path` if the block succeeds.

    It has the suffix of `path`. A file that is there already is replaced; after any exception
    `path` is as before.

    Raises:
        OutputError: `path` is a folder, nothing was written, no permission, or a full disk.
    """
    target = _absolute(path)
    temporary = _sibling(target)
    try:
        with _explained(target, temporary):
            _check_not_folder(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if not temporary.is_file():
                raise OutputError(f"nothing was written for {target}; expected a file {temporary}")
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, *, folder: bool = True) -> None:
    """Fail before long work if `atomic_directory(path)` (or `atomic_file`) is bound to fail.

    Writes a small file next to `path` and removes it; makes no folder.

    Args:
        path: the output to come.
        folder: whether the output is a folder or a file.

    Raises:
        OutputError: as `atomic_directory`, or as `atomic_file` where `folder` is false.
    """
    target = _absolute(path)
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    probe = _sibling(parent / target.name)
    try:
        with _explained(target, probe):
            _check_replaceable(target) if folder else _check_not_folder(target)
            probe.write_bytes(b"reprune")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _absolute(path: str | Path) -> Path:
    """`path` without links, so that a link to an output stays one."""
    target = Path(path).resolve()
    if not target.name:
        raise OutputError(f"cannot write to {target}: name a new folder or file in it")
    return target


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.stem}-{secrets.token_hex(4)}.tmp{target.suffix}")


def _files(folder: Path) -> list[str]:
    """Every file and link below `folder`, relative, with forward slashes."""
    found = []
    for where, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [Path(where, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; expected a new or empty folder: choose another")
    present = [name for name in _files(target) if Path(name).name not in _DESKTOP_FILES]
    if present and MANIFEST not in present:
        raise OutputError(
            f"{target} is not empty and was not made by reprune: choose a new or empty folder"
        )
    known = {MANIFEST}
    if present:
        known.update((target / MANIFEST).read_text("utf-8", errors="replace").splitlines())
    foreign = [name for name in present if name not in known]
    if foreign:
        raise OutputError(
            f"{target} holds files that reprune did not write: {', '.join(foreign[:5])}"
            f"{', ...' if len(foreign) > 5 else ''}; move them away or choose another folder"
        )


def _check_not_folder(target: Path) -> None:
    if target.is_dir():
        raise OutputError(f"{target} is a folder; expected the path of a file")


def _replace(target: Path, new: Path) -> None:
    """Put the folder `new` at `target`; what was there goes, or stays if that fails."""
    if not target.exists():
        new.rename(target)
        return
    old = _sibling(target)
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _explained(target: Path, temporary: Path) -> Iterator[None]:
    """Full disks, and errors about `temporary` or the way to `target`, become `OutputError`."""
    try:
        yield
    except RepruneError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            raise OutputError(
                f"the disk is full: cannot write {target} ({error}); free some space or write "
                "elsewhere"
            ) from error
        if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
            culprit = Path(os.path.abspath(error.filename))  # or an input that the block reads
            if culprit.is_relative_to(temporary) or target.is_relative_to(culprit):
                what = "no permission to write" if code in _DENIED else "cannot write"
                raise OutputError(f"{what} {target} ({error}); choose another place") from error
        raise
