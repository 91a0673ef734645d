"""The files of an unfinished run, beside its output: enough to continue after a crash, bit for bit.

    job.json         fingerprint of input, weights and settings
    frames.raw       LR frames, uint8, or uint16 of a deep clip
    alpha.raw        their alpha, if they have any
    clip.json        the frame table (times, names) and the scene cuts; written after the last frame
    plan.json        which of flows and pictures there is room for; written before the first flow
    flows.raw        both flows of each pair, float32, at the size at which they were estimated; deleted after the loop
    latents.raw      two slots per frame, so that the input of a step outlives the step
    estimates.raw    the same for the clean estimates, if the sampler needs them
    borders.raw      the clean estimates at the borders of segments, if there are any
    pictures.raw     decoded frames, uint8 or uint16; in streaming mode those not yet safe in `written`
    written, written.pair    in streaming mode, the outputs so far: finished segments, or a folder's images
    state.safetensors    how far the run is, and the last clean estimate
    first_pass/      for more than four times the size: a workspace without a job, whose pictures the second pass reads
output           what is being written; renamed to the final name when complete. For a short time there are also
                     output.rehearsal and output.joined, see `media.video_writer`
    outside.json     the temporary file that is elsewhere, to be removed after a crash
    units.json, units/    of a run that several processes share (`stablevsr.cluster`): its scenes, and the finished ones
    probe.json       a random word by which a worker on another machine knows that it sees this very folder
    turn.lock        held by the one of several processes that reads the input, or joins the finished scenes

Plain reads and writes instead of memory maps: a full disk then raises an error that can be reported.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from stablevsr.atomic import hidden_sibling, remove, replacing
from stablevsr.engine.array_file import ArrayFile, using
from stablevsr.engine.state import RunState
from stablevsr.errors import OptionsError, ResourceError, UserError

try:
    import fcntl
except ImportError:  # on Windows, where nothing prevents two runs for one output
    fcntl = None  # type: ignore[assignment]  # a module or none

log = logging.getLogger(__name__)

FORMAT = 3  # of the folder; increased when runs of an older one cannot be continued
FILES = (
    "lock",
    "job.json",
    "frames.raw",
    "alpha.raw",
    "clip.json",
    "plan.json",
    "flows.raw",
    "latents.raw",
    "estimates.raw",
    "borders.raw",
    "state.safetensors",
    "pictures.raw",
    "written",
    "written.pair",
    "first_pass",
    "output",
    "output.joined",
    "output.rehearsal",
    "outside.json",
    "units.json",
    "units",
    "probe.json",
    "turn.lock",
)
KEPT_AT_START = ("lock", "turn.lock", "output", "outside.json")  # the last two belong to the writers just opened
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # as some network file systems answer


class Busy(ResourceError):
    """Another process works in the workspace."""


class Workspace:
    """The folder of one run. Use `open_workspace`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_ours = False  # whether it holds the current run
        self._arrays: dict[str, ArrayFile] = {}

    def begin(self, fingerprint: dict[str, object], restart: bool = False) -> None:
        """Continue the run that is here, or start a new one.

        Args:
            fingerprint: what an unfinished run must match to be continued.
            restart: discard what is here.

        Raises:
            UserError: when the unfinished run differs, naming how.
        """
        now = json.loads(json.dumps({"workspace format": FORMAT, **fingerprint}, default=_plain))
        found = None if restart else self.noted("job")
        if found is not None:
            _require_match(self.folder, found, now)
            self.is_ours = True
            return
        for name in os.listdir(self.folder):
            if name not in KEPT_AT_START:
                remove(self.folder / name)
        self.note("job", now)
        self.is_ours = True

    def has_begun(self) -> bool:
        """Whether a run was started here."""
        return (self.folder / "job.json").exists()

    def arrays(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ArrayFile:
        """The file NAME.raw."""
        if name not in self._arrays:
            self._arrays[name] = ArrayFile(self.folder / f"{name}.raw", shape, dtype)
        return self._arrays[name]

    def drop(self, name: str) -> None:
        """Remove the file NAME.raw, if it exists."""
        if name in self._arrays:
            self._arrays.pop(name).close()
        path = self.folder / f"{name}.raw"
        with using(path):
            remove(path)

    def outside(self, path: Path) -> Path:
        """A hidden name beside `path`, for a temporary on another disk; the next run removes what a crash left there.

        It is random, so that nobody can have placed another file there.
        """
        part = hidden_sibling(Path(os.path.realpath(path)))
        self.note("outside", {"part": str(part)})
        return part

    def note(self, name: str, values: dict) -> None:
        """Write NAME.json, atomically."""
        path = self.folder / f"{name}.json"
        with using(path), replacing(path) as part:
            part.write_text(json.dumps(values, indent=1) + "\n")

    def noted(self, name: str) -> dict | None:
        """The content of NAME.json; None if it does not exist."""
        path = self.folder / f"{name}.json"
        try:
            with using(path):
                values = json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise _damaged(path) from error
        if not isinstance(values, dict | None):
            raise _damaged(path)
        return values

    def save_state(self, state: RunState) -> None:
        """Record how far the run is, atomically."""
        path = self.folder / "state.safetensors"
        with using(path), replacing(path) as part:
            part.write_bytes(state.to_bytes())

    def state(self, device: torch.device) -> RunState:
        """How far the run is.

        Args:
            device: where the run computes.
        """
        path = self.folder / "state.safetensors"
        if not path.exists():
            return RunState()
        with using(path):
            data = path.read_bytes()
        try:
            return RunState.from_bytes(data, device)
        except Exception as error:
            raise _damaged(path) from error

    def has_state(self) -> bool:
        """Whether any work has been recorded, in either pass."""
        return any((folder / "state.safetensors").exists() for folder in (self.folder, self.folder / "first_pass"))

    def first_pass(self) -> "Workspace":
        """The files of the first of two passes."""
        folder = self.folder / "first_pass"
        with using(folder):
            folder.mkdir(exist_ok=True)
        first = Workspace(folder)
        first.clean()
        return first

    def sync(self) -> None:
        """Flush the arrays to the disk."""
        for array in list(self._arrays.values()):  # another thread may be opening one
            array.sync()

    def close(self) -> None:
        for array in self._arrays.values():
            array.close()
        self._arrays.clear()

    def remove(self) -> None:
        """Delete the folder, when the work is done or there is nothing worth keeping."""
        self.close()
        with using(self.folder):
            shutil.rmtree(self.folder)

    def clean(self) -> None:
        """Remove the temporary files of a killed process, here and outside."""
        for stale in self.folder.glob(".stablevsr-*.part"):
            remove(stale)
        with suppress(UserError):  # an unreadable list is no reason to stop
            part = Path(str((self.noted("outside") or {}).get("part", "")))
            if part.name.startswith(".stablevsr-") and part.suffix == ".part":
                remove(part)
        remove(self.folder / "outside.json")


def workspace_path(output: Path) -> Path:
    """The folder beside `output` that holds its unfinished run."""
    output = Path(os.path.realpath(output))  # Path.resolve fails for links in a circle
    return output.with_name(output.name + ".unfinished")


@contextmanager
def open_workspace(output: Path, shared: bool = False) -> Iterator[Workspace]:
    """The workspace of the run that writes `output`, new or existing, locked against other processes.

    It is removed if the block ends before a run was started in it. Errors of the block pass through unchanged.

    Args:
        shared: with other processes that say so too; nothing is then cleaned up here, since it may be in use.

    Raises:
        Busy: when another process uses it.
        UserError: when the folder is not a workspace, is a link, belongs to another user, or cannot be created.
    """
    folder = workspace_path(output)
    try:
        _make(folder)
        lock = (folder / "lock").open("a+")  # network file systems take shared locks on readable files only
    except OSError as error:
        raise ResourceError(
            f"{folder}, where the unfinished run is kept, cannot be used ({error.strerror}): "
            "make room, or choose another output"
        ) from error
    with closing(lock):
        _lock(lock, output, folder, shared)
        _require_known_files(folder)
        workspace = Workspace(folder)
        try:
            if not shared:
                with using(folder):
                    workspace.clean()
            yield workspace
        finally:
            workspace.close()
            if not shared and folder.exists() and not workspace.has_begun():
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def turn(workspace: Workspace) -> Iterator[bool]:
    """Of the processes that share a workspace, let one at a time run the block; the others wait.

    Yields whether the workspace still exists: the process before may have finished the run.
    """
    path = workspace.folder / "turn.lock"
    if not workspace.folder.exists():
        yield False
        return
    with using(path):
        lock = path.open("a+")
    with closing(lock):
        with using(path):
            _wait_for(lock)
        yield path.exists()


def _wait_for(lock: TextIO) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in CANNOT_LOCK:  # without locks the same work may be done twice, with the same result
            raise


def _make(folder: Path) -> None:
    """Create the folder, for this user only, unless it exists; `UserError` if it is not a folder of this user."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir():
        kind = "a link" if folder.is_symlink() else "a file"
        raise ResourceError(f"{folder} is {kind}, expected a folder: move it away")
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid() and found.st_uid != _owner_of_new_files(folder.parent):
        raise ResourceError(f"{folder} belongs to another user (uid {found.st_uid}): choose another output")
    if found.st_mode & 0o077:  # created by an older version
        with suppress(OSError):
            folder.chmod(0o700)


def _owner_of_new_files(folder: Path) -> int:
    """The uid that files of this process get in `folder`; network and Windows mounts may map it to another."""
    probe = hidden_sibling(folder / "probe")
    try:
        probe.touch()
        return probe.stat().st_uid
    finally:
        remove(probe)


def _lock(lock: TextIO, output: Path, folder: Path, shared: bool) -> None:
    if fcntl is None:
        lock.close()  # Windows does not delete files that are open
        return
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(
            f"another run is writing {output} and uses {folder}: wait for it, or choose another output"
        ) from error
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise ResourceError(f"{folder} cannot be locked ({error.strerror}): choose another output") from error
        log.warning("%s is on a file system without locks: do not start a second run for the same output", folder)


def _require_known_files(folder: Path) -> None:
    for name in sorted(os.listdir(folder)):
        if name not in FILES and not name.startswith(".stablevsr-"):
            raise ResourceError(f"{folder} holds {name}, which is not part of an unfinished run: move it away")


def _require_match(folder: Path, found: dict[str, object], now: dict[str, object]) -> None:
    """`UserError` for the first difference between an unfinished run and this one."""
    version = "version of stablevsr"
    if any(found.get(name) != now.get(name) for name in ("workspace format", version)):
        raise OptionsError(
            f"{folder} was started by another version of stablevsr ({found.get(version, 'unknown')}, "
            f"now {now.get(version)}): finish it with that version, or start again with --restart"
        )
    for name in now | found:
        if name not in found or name not in now or found[name] != now[name]:
            raise OptionsError(
                f"{folder} was started with another {name} ({found.get(name)}, now {now.get(name)}): "
                "use the same again, or start again with --restart"
            )


def _plain(value: object) -> object:
    # numpy scalars, which JSON does not know
    return value.item() if isinstance(value, np.generic) else str(value)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: start again with --restart")
