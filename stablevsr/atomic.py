"""Atomic replacement of files and folders: at any moment either the old or the new one is complete."""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stablevsr.errors import OptionsError, ResourceError

# Errors of fsync on file systems that do not support it; there is nothing the user could do.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden name to write a file or a folder to: renamed to `path` when the block succeeds, else removed.

    A symbolic link is followed, not replaced. The new file keeps the permissions of the old one.

    Raises:
        OptionsError: when `path` is a folder or a device.
        ResourceError: when the rename fails.
    """
    path = path.resolve()
    restore(path)
    if path.exists() and not path.is_file():
        raise OptionsError(f"{path} exists and is not a regular file; choose another name")
    part = hidden_sibling(path)
    permissions = _default_permissions(part)
    try:
        yield part
        for written in [part, *part.rglob("*")] if part.is_dir() else [part]:
            sync(written)
            _set_permissions(written, permissions)
        put_in_place(part, path)
    finally:
        remove(part)


def _default_permissions(unused: Path) -> int:
    """The permissions of a new file in this folder. Probed, because to read the umask is to set it, in all threads."""
    os.close(os.open(unused, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        return stat.S_IMODE(unused.stat().st_mode)
    finally:
        unused.unlink()


def _set_permissions(path: Path, permissions: int) -> None:
    # Libraries that write through a temporary file of their own leave it readable by its owner only.
    if path.is_dir():
        permissions |= (permissions & 0o444) >> 2  # those who may read a folder may enter it
    if stat.S_IMODE(path.stat().st_mode) != permissions:
        path.chmod(permissions)


def hidden_sibling(path: Path) -> Path:
    """A new hidden name beside `path`, on the same file system, so that a rename to `path` is atomic."""
    return path.with_name(f".stablevsr-{secrets.token_hex(6)}.part")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, where the file system supports it."""
    if path.is_dir():
        # Makes renames and new names durable. Windows cannot open folders, and some network mounts cannot flush them.
        with suppress(OSError):
            _fsync(path, os.O_RDONLY)
        return
    try:
        _fsync(path, os.O_RDWR)  # Windows flushes only files open for writing
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(part: Path, path: Path) -> None:
    """Rename `part`, already flushed, to `path`; an old folder is removed only after the rename has succeeded.

    The new file or folder keeps the permissions of the old one.

    Raises:
        ResourceError: when the rename fails (the old `path` is then restored) or the old folder cannot be removed.
    """
    try:
        restore(path)
        if path.exists():
            permissions = stat.S_IMODE(path.stat().st_mode)
            if stat.S_IMODE(part.stat().st_mode) != permissions:
                part.chmod(permissions)
        if path.is_dir():
            _swap_folder(part, path)
        else:
            os.replace(part, path)
    except OSError as error:
        raise ResourceError(
            f"the new {path} could not be put in place ({error.strerror}); "
            "close the program that uses it, or choose another output"
        ) from error
    sync(path.parent)


def restore(path: Path) -> None:
    """Clean up after a process that was killed while it replaced the folder `path`: leaves the old or the new one."""
    path = Path(os.path.realpath(path))  # Path.resolve fails for circular links
    old = _set_aside(path)
    if not os.path.lexists(old):
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(path)


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    # Always the same name, so that `restore` finds it; a digest, because `path` may have the longest name allowed.
    return path.with_name(f".stablevsr-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}.old")


def _swap_folder(part: Path, path: Path) -> None:
    # rename cannot replace a folder that is not empty, so the old one is renamed first.
    old = _set_aside(path)
    try:
        path.rename(old)
        part.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        raise ResourceError(f"{path} is complete, but the folder it replaced could not be deleted; delete {old}")
