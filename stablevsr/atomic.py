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
    """A hidden name to write a file or folder to: put in place of `path` when the block ends well, else removed."""
    part = hidden_sibling(path)
    try:
        yield part
        sync(part)
        put_in_place(part, path)
    finally:
        remove(part)


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
