"""Replacing files and folders: permissions, killed processes, and file systems that cannot flush."""

import errno
import os
import stat
from pathlib import Path

import pytest

from stablevsr import atomic
from stablevsr.atomic import put_in_place, replacing, restore, sync

POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@POSIX
@pytest.mark.parametrize("rights", [0o600, 0o444, 0o664])
def test_a_replaced_file_passes_its_permissions_on(tmp_path: Path, rights: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(rights)
    with replacing(path) as part:
        part.write_text("new")
    assert (path.read_text(), mode(path)) == ("new", rights)
    part.write_text("newer")
    put_in_place(part, path)  # as writers of media do
    assert (path.read_text(), mode(path)) == ("newer", rights)


@POSIX
def test_a_replaced_folder_passes_its_permissions_on(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "folder", "old")
    path.chmod(0o700)
    put_in_place(folder_with(tmp_path / "part", "new"), path)
    assert ((path / "file").read_text(), mode(path)) == ("new", 0o700)


@POSIX
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_new_files_have_the_usual_permissions_and_the_umask_is_never_touched(tmp_path, monkeypatch, umask) -> None:
    """Not even for a moment: other threads make files, too."""
    before = os.umask(umask)
    try:
        with monkeypatch.context() as context:
            context.setattr(os, "umask", None)
            with replacing(tmp_path / "file") as part:
                part.touch(0o600)  # as libraries do that write through a temporary
            with replacing(tmp_path / "folder") as part:
                part.mkdir(0o700)
                (part / "file").touch(0o600)
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == mode(tmp_path / "folder/file") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_cannot_be_flushed_is_no_error_once_the_new_file_is_there(tmp_path, monkeypatch) -> None:
    """Windows cannot open folders; its fsync wants files that are open for writing."""
    real_open, real_fsync, writable = os.open, os.fsync, set()

    def open_(path: os.PathLike, flags: int, *more: int, **options: object) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        handle = real_open(path, flags, *more, **options)
        (writable.add if flags & (os.O_RDWR | os.O_WRONLY) else writable.discard)(handle)
        return handle

    def fsync(handle: int) -> None:
        if handle not in writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real_fsync(handle)

    monkeypatch.setattr(atomic.os, "open", open_)
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with replacing(tmp_path / "file") as part:
        part.write_text("new")
    with replacing(tmp_path / "folder") as part:
        folder_with(part, "new")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_a_folder_whose_fsync_fails_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "file") as part:
        part.write_text("new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_file_must_be_flushed_unless_its_file_system_cannot(tmp_path, monkeypatch, code: int) -> None:
    (tmp_path / "file").touch()

    def fsync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EINVAL:
        sync(tmp_path / "file")
    else:
        with pytest.raises(OSError, match="Input/output"):
            sync(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("killed_after", ["the old one stepped aside", "the new one is there"])
def test_a_process_killed_between_two_renames(tmp_path: Path, monkeypatch, killed_after: str) -> None:
    """The next run finds the old folder, or the new one, under its name, and nothing else is left."""
    path, part = folder_with(tmp_path / "folder", "old"), folder_with(tmp_path / "part", "new")
    child = os.fork()
    if child == 0:
        real, renames = Path.rename, 0

        def rename(self: Path, target: Path) -> Path:
            nonlocal renames
            renames += 1
            if renames == 2 and killed_after == "the old one stepped aside":
                os._exit(9)
            result = real(self, target)
            if renames == 2:
                os._exit(9)
            return result

        monkeypatch.setattr(Path, "rename", rename)
        put_in_place(part, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    restore(path)
    expected = "old" if killed_after == "the old one stepped aside" else "new"
    assert (path / "file").read_text() == expected
    if part.exists():
        put_in_place(part, path)  # what the next run does in the end
    assert (path / "file").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
