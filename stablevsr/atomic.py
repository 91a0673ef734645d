"""Putting a finished file or folder in the place of an old one, so that one of the two is always whole."""

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

# What fsync answers on file systems that cannot do it; nothing the user could mend.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name to write a file or a new folder to: put in place of `path` when the block ends well, else removed.

    A link is written through, not replaced. A file that is replaced passes its permissions on. Raises UserError when
    something other than a file stands at `path`.
    """
    path = path.resolve()
    restore(path)
    if path.exists() and not path.is_file():
        raise OptionsError(f"{path} exists and is not an ordinary file; choose another name.")
    part = hidden_sibling(path)
    rights = _usual_rights(part)
    try:
        yield part
        for written in [part, *part.rglob("*")] if part.is_dir() else [part]:
            sync(written)
            _give_rights(written, rights)
        put_in_place(part, path)
    finally:
        remove(part)


def _usual_rights(unused: Path) -> int:
    """The permissions of a new file in this folder. A probe, because asking for the umask means changing it for all."""
    os.close(os.open(unused, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        return stat.S_IMODE(unused.stat().st_mode)
    finally:
        unused.unlink()


def _give_rights(path: Path, rights: int) -> None:
    # Libraries that write through a temporary of their own leave files that only their owner can read.
    if path.is_dir():
        rights |= (rights & 0o444) >> 2  # who may read a folder may enter it
    if stat.S_IMODE(path.stat().st_mode) != rights:
        path.chmod(rights)


def hidden_sibling(path: Path) -> Path:
    """A new hidden name next to `path`, so that renaming it to `path` stays within one file system."""
    return path.with_name(f".stablevsr-{secrets.token_hex(6)}.part")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, where its file system can do that."""
    if path.is_dir():
        # Makes renames and new names last. Windows cannot open folders, and some network mounts cannot flush them.
        with suppress(OSError):
            _fsync(path, os.O_RDONLY)
        return
    try:
        _fsync(path, os.O_RDWR)  # Windows flushes only what is open for writing
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
    """Rename `part`, already flushed, to `path`; what stood there before is removed only after that worked.

    The new file or folder gets the permissions of the old one.

    Raises UserError when the rename fails (the old `path` is then back) or the old folder cannot be removed.
    """
    try:
        restore(path)
        if path.exists():
            rights = stat.S_IMODE(path.stat().st_mode)
            if stat.S_IMODE(part.stat().st_mode) != rights:
                part.chmod(rights)
        if path.is_dir():
            _swap_folder(part, path)
        else:
            os.replace(part, path)
    except OSError as error:
        raise ResourceError(
            f"The new {path} could not be put in place ({error.strerror}); "
            "close whatever is using it or choose another output."
        ) from error
    sync(path.parent)


def restore(path: Path) -> None:
    """Clean up after a process that was killed while it replaced the folder `path`: the old or the new one is there."""
    path = Path(os.path.realpath(path))  # Path.resolve fails for links in a circle
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
    # The same name each time, so that `restore` finds it; a digest, because the name itself may be as long as allowed.
    return path.with_name(f".stablevsr-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}.old")


def _swap_folder(part: Path, path: Path) -> None:
    # A folder that is not empty cannot be renamed over, so the old one steps aside first.
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
        raise ResourceError(
            f"{path} is complete, but the folder it replaced could not be deleted from {old}; delete it."
        )
