"""The user's cache: converted weights, and downloads that are not finished. Imports no torch."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from stablevsr.atomic import remove
from stablevsr.errors import OptionsError, ResourceError
from stablevsr.hub.names import PREFIX, Name

WEIGHTS = "stablevsr.safetensors"
LATEST = "latest"  # in place of a revision, where none was asked for


def cache_folder() -> Path:
    """Where this user's caches belong, by the system's own convention; XDG_CACHE_HOME counts everywhere."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "stablevsr"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/stablevsr"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "stablevsr/Cache"
    return Path.home() / ".cache/stablevsr"


def weights_file(name: Name) -> Path:
    """The converted weights of a model, whether they exist or not."""
    return cache_folder() / "weights" / _key(name) / WEIGHTS


def download_folder(name: Name, commit: str) -> Path:
    """Where the published files are until they are converted."""
    return cache_folder() / "downloads" / _key(Name(name.repo, commit))


def _key(name: Name) -> str:
    return f"{name.repo}@{name.revision or LATEST}".replace("/", "--")


@dataclass(frozen=True)
class Entry:
    """Something in the cache.

    finished: whether these are converted weights, not a download or what a killed process has left.
    """

    name: str  # OWNER/NAME@REVISION
    folder: Path
    finished: bool
    bytes: int
    changed: datetime


def entries() -> list[Entry]:
    """What is in the cache, by name.

    Raises:
        ResourceError: when it cannot be read.
    """
    try:
        return sorted(_entries(), key=lambda entry: (entry.name, entry.finished))
    except OSError as error:
        raise ResourceError(f"the cache {cache_folder()} cannot be read ({error.strerror}): check the disk") from error


def _entries() -> Iterator[Entry]:
    for kind in ("weights", "downloads"):
        folder = cache_folder() / kind
        for each in folder.iterdir() if folder.is_dir() else ():
            if each.is_dir() and "@" in each.name:
                files = [file.lstat() for file in each.rglob("*") if file.is_file() or file.is_symlink()]
                owner, _, rest = each.name.partition("--")
                changed = datetime.fromtimestamp(max((file.st_mtime for file in files), default=each.stat().st_mtime))
                size = sum(file.st_size for file in files)
                finished = kind == "weights" and (each / WEIGHTS).is_file()
                yield Entry(f"{owner}/{rest}", each, finished, size, changed)


def clear(names: Sequence[str]) -> list[Entry]:
    """Delete what is in the cache of these models, OWNER/NAME or OWNER/NAME@REVISION; without names, everything.

    Returns:
        What was deleted.

    Raises:
        OptionsError: for a name that the cache does not have; nothing is deleted then.
        ResourceError: when something could not be deleted.
    """
    present = entries()
    chosen = present if not names else []
    for name in names:
        key = name.removeprefix(PREFIX).replace("/", "--")
        found = [entry for entry in present if key in (entry.folder.name, entry.folder.name.partition("@")[0])]
        if not found:
            have = ", ".join(dict.fromkeys(entry.name for entry in present)) or "nothing"
            raise OptionsError(f"got {name}, but the cache has {have}")
        chosen += found
    chosen = list(dict.fromkeys(chosen))
    for entry in chosen:
        remove(entry.folder)
        if entry.folder.exists():
            raise ResourceError(f"{entry.folder} could not be deleted: check its permissions, or delete it by hand")
    return chosen
