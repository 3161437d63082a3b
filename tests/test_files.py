from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reprune.errors import OutputError
from reprune.files import MANIFEST, atomic_directory, atomic_file, check_writable


def make(path: Path, **contents: str) -> None:
    with atomic_directory(path) as folder:
        for name, text in contents.items():
            (folder / name).write_text(text)


def attempt(atomic, path: Path, work: Callable[[Path], object]) -> None:
    with atomic(path) as temporary:
        work(temporary)


def breaking(error: BaseException | type[BaseException], name: str = "") -> Callable[[Path], None]:
    """Work that writes "2" and then fails."""

    def work(path: Path) -> None:
        (path / name if name else path).write_text("2")
        raise error

    return work


ACCIDENTS = (KeyboardInterrupt, ValueError, OutputError)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture(params=[KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "full")])
def accident(request):
    return request.param


# --- folders -----------------------------------------------------------------------------


def test_a_new_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as folder:
        (folder / "figures").mkdir()
        (folder / "figures/a.txt").write_text("a")
        assert not out.exists()
    assert (out / "figures/a.txt").read_text() == "a"
    assert names(out.parent) == ["out"]
    assert out.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_an_empty_folder_and_an_earlier_output_are_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    make(out, a="1", b="1")
    make(out, a="2")
    assert names(out) == [MANIFEST, "a"]
    assert (out / "a").read_text() == "2"
    assert names(tmp_path) == ["out"]
    (out / ".DS_Store").write_text("the desktop looked at it")
    make(out, a="3")
    assert (out / "a").read_text() == "3"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("mine")
    for call in (lambda: make(out, a="1"), lambda: check_writable(out)):
        with pytest.raises(OutputError, match="is not empty and was not made by reprune: choose"):
            call()
    assert (out / "report.json").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_files_added_to_an_earlier_output_are_not_lost(tmp_path):
    out = tmp_path / "out"
    make(out, a="1")
    (out / "notes").mkdir()
    (out / "notes/mine.txt").write_text("mine")
    with pytest.raises(
        OutputError, match=r"files that reprune did not write: notes/mine\.txt; move"
    ):
        make(out, a="2")
    assert (out / "a").read_text() == "1"


def test_files_added_during_the_work_are_not_lost(tmp_path):
    out = tmp_path / "out"

    def work(folder: Path) -> None:
        out.mkdir()
        (out / "mine").write_text("mine")

    with pytest.raises(OutputError, match="was not made by reprune"):
        attempt(atomic_directory, out, work)
    assert names(out) == ["mine"]
    assert names(tmp_path) == ["out"]


def test_after_an_accident_the_old_folder_is_as_before(tmp_path, accident):
    out = tmp_path / "out"
    make(out, a="1")
    with pytest.raises(ACCIDENTS):
        attempt(atomic_directory, out, breaking(accident, "a"))
    assert names(out) == [MANIFEST, "a"]
    assert (out / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_an_accident_during_the_replacement_brings_the_old_folder_back(
    tmp_path, monkeypatch, accident
):
    out = tmp_path / "out"
    make(out, a="1")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == out and "2" in [p.read_text() for p in self.glob("a")]:
            raise accident
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ACCIDENTS):
        make(out, a="2")
    assert (out / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_a_link_to_the_output_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link", a="1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/a").read_text() == "1"


def test_a_file_in_the_way(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    for call in (lambda: make(path), lambda: check_writable(path)):
        with pytest.raises(OutputError, match="out is a file; expected a new or empty folder"):
            call()
    with pytest.raises(OutputError, match=r"cannot write .*out/below .*choose another place"):
        make(path / "below")
    assert path.read_text() == "mine"


def test_the_root_is_no_output():
    with pytest.raises(OutputError, match="name a new folder or file in it"):
        make(Path("/"))


# --- what went wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"),
    ],
)
def test_full_disk(tmp_path, error):
    for atomic in (atomic_directory, atomic_file):
        work = breaking(error, "a" if atomic is atomic_directory else "")
        with pytest.raises(OutputError, match=r"the disk is full: cannot write .*free some space"):
            attempt(atomic, tmp_path / "out", work)
    assert names(tmp_path) == []


def test_full_disk_while_checking(tmp_path, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="the disk is full"):
        check_writable(tmp_path / "out")


def test_no_permission(tmp_path, monkeypatch):
    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(OutputError, match=r"no permission to write .*out .*choose another place"):
        make(tmp_path / "out")
    with pytest.raises(OutputError, match=r"no permission to write .*out"):
        check_writable(tmp_path / "out")
    with pytest.raises(OutputError, match=r"no permission to write .*a.txt"):
        attempt(atomic_file, tmp_path / "a.txt", lambda file: file.write_bytes(b""))


def test_errors_about_inputs_stay_what_they_are(tmp_path):
    for atomic in (atomic_directory, atomic_file):
        with pytest.raises(FileNotFoundError, match=r"input\.txt") as caught:
            attempt(atomic, tmp_path / "out", lambda _: (tmp_path / "input.txt").read_text())
        assert not isinstance(caught.value, OutputError)


def test_a_name_too_long(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        make(tmp_path / ("a" * 300))
    with pytest.raises(OutputError, match="cannot write"):
        check_writable(tmp_path / ("a" * 300))


# --- files -------------------------------------------------------------------------------


def test_a_file_appears_whole_and_is_replaced(tmp_path):
    path = tmp_path / "deep/out.npz"
    for text in ("1", "2"):
        with atomic_file(path) as file:
            assert file.suffix == ".npz"
            assert file.parent == path.parent
            file.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["out.npz"]


def test_after_an_accident_the_old_file_is_as_before(tmp_path, accident):
    path = tmp_path / "out.txt"
    path.write_text("1")
    with pytest.raises(ACCIDENTS):
        attempt(atomic_file, path, breaking(accident))
    assert path.read_text() == "1"
    assert names(tmp_path) == ["out.txt"]


def test_a_folder_in_the_way_of_a_file(tmp_path):
    with pytest.raises(OutputError, match="is a folder; expected the path of a file"):
        attempt(atomic_file, tmp_path, print)
    with pytest.raises(OutputError, match="is a folder; expected the path of a file"):
        check_writable(tmp_path, folder=False)


def test_a_block_that_writes_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"nothing was written for .*out\.txt"):
        attempt(atomic_file, tmp_path / "out.txt", str)


# --- early check -------------------------------------------------------------------------


def test_the_check_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "deep/deeper/out")
    check_writable(tmp_path / "a.txt", folder=False)
    make(tmp_path / "out", a="1")
    check_writable(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_temporary_folder_removed_by_the_block(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        attempt(atomic_directory, tmp_path / "out", shutil.rmtree)
    assert names(tmp_path) == []
