"""Putting a finished file or folder in the place of an old one, so that one of the two is always whole."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stablevsr.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name to write a file or a new folder to: put in place of `path` when the block ends well, else removed.

    A link is written through, not replaced. Raises UserError when something else than a file stands at `path`.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"{path} exists and is not an ordinary file; choose another name.")
    part = hidden_sibling(path)
    try:
        yield part
        for written in [part, *part.rglob("*")] if part.is_dir() else [part]:
            _give_usual_rights(written)
            sync(written)
        put_in_place(part, path)
    finally:
        remove(part)


def _give_usual_rights(path: Path) -> None:
    # Libraries that write through a temporary of their own leave files that only their owner can read.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def hidden_sibling(path: Path) -> Path:
    """A new hidden name next to `path`, so that renaming it to `path` stays within one file system."""
    return path.with_name(f".stablevsr-{secrets.token_hex(6)}.part")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(part: Path, path: Path) -> None:
    """Rename `part`, already flushed, to `path`; what stood there before is removed only after that worked.

    Raises UserError when the rename fails (the old `path` is then back) or the old folder cannot be removed.
    """
    try:
        if path.is_dir():
            _swap_folder(part, path)
        else:
            os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"The new {path} could not be put in place ({error.strerror}); "
            "close whatever is using it or choose another output."
        ) from error


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _swap_folder(part: Path, path: Path) -> None:
    # A folder that is not empty cannot be renamed over, so the old one steps aside first.
    old = hidden_sibling(path)
    try:
        path.rename(old)
        part.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        raise UserError(f"{path} is complete, but the folder it replaced could not be deleted from {old}; delete it.")
