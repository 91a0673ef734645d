"""What an unfinished run keeps on disk, beside its output: enough to go on after a crash, to the bit.

    job.json         fingerprint of input, weights and settings
    frames.raw       LR frames, uint8, or uint16 of a deep clip
    clip.json        how many they are and where scenes begin; written when all frames are there
    flows.raw        both flows of each pair, float32
    latents.raw      two slots a frame: what a step starts from outlives the step
    estimates.raw    the same for the clean estimates, where the sampler wants them
    state.safetensors    how far the run is, and the last clean estimate
    tiles.json       from which unit on decoding fell back to tiles; only there if it did
    output           what is being written; renamed to the final name when whole

Plain reads and writes instead of memory maps: a full disk is then an error that can be told, not a crash.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from stablevsr.atomic import remove, replacing
from stablevsr.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where nobody stops two runs at one output
    fcntl = None

FILES = (
    "lock",
    "job.json",
    "frames.raw",
    "clip.json",
    "flows.raw",
    "latents.raw",
    "estimates.raw",
    "state.safetensors",
    "tiles.json",
    "output",
)
PHASES = ("flow", "denoise")
NUMPY = {torch.uint8: np.uint8, torch.uint16: np.uint16, torch.float32: np.float32}


class ArrayFile:
    """A file of equally shaped arrays, read and written one at a time; grows by writing behind its end."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, NUMPY[dtype]
        self.bytes = int(np.prod(shape)) * np.dtype(self.dtype).itemsize
        path.touch()
        self._file = path.open("r+b")

    def read(self, index: int) -> Tensor:
        self._file.seek(index * self.bytes)
        data = self._file.read(self.bytes)
        if len(data) != self.bytes:
            raise UserError(f"{self.path} is shorter than it should be; start again with --restart")
        return torch.from_numpy(np.frombuffer(bytearray(data), self.dtype).reshape(self.shape))

    def write(self, index: int, value: Tensor) -> None:
        """Raises OSError when the disk is full."""
        self._file.seek(index * self.bytes)
        self._file.write(np.ascontiguousarray(value.cpu().numpy(), dtype=self.dtype).data)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # only what was not flushed, which somebody has been told of
            self._file.close()


class Workspace:
    """The folder of one run. Use `open_workspace`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, ArrayFile] = {}

    def arrays(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ArrayFile:
        """The file NAME.raw."""
        if name not in self._arrays:
            self._arrays[name] = ArrayFile(self.folder / f"{name}.raw", shape, dtype)
        return self._arrays[name]

    def note(self, name: str, values: dict) -> None:
        """Write NAME.json, whole or not at all."""
        with replacing(self.folder / f"{name}.json") as part:
            part.write_text(json.dumps(values, indent=1) + "\n")

    def noted(self, name: str) -> dict | None:
        """What NAME.json says; None if it is not there."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path} is damaged; start again with --restart") from error

    def save_state(self, phase: str, done: int, x0: Tensor | None) -> None:
        """Record that `done` units of a phase are on disk; whole or not at all."""
        tensors = {"done": torch.tensor([PHASES.index(phase), done])}
        if x0 is not None:
            tensors["x0"] = x0.cpu().contiguous()
        with replacing(self.folder / "state.safetensors") as part:
            part.write_bytes(save(tensors))

    def state(self) -> tuple[str, int, Tensor | None]:
        """The phase a run is in, "flow" or "denoise", how many units of it are done, and the last clean estimate."""
        path = self.folder / "state.safetensors"
        try:
            tensors = load(path.read_bytes())
        except FileNotFoundError:
            return "flow", 0, None
        except Exception as error:
            raise UserError(f"{path} is damaged; start again with --restart") from error
        phase, done = tensors["done"].tolist()
        return PHASES[phase], done, tensors.get("x0")

    def has_state(self) -> bool:
        """Whether any work has been recorded."""
        return (self.folder / "state.safetensors").exists()

    def sync(self) -> None:
        """Flush the arrays to the disk."""
        for array in self._arrays.values():
            array.sync()

    def close(self) -> None:
        for array in self._arrays.values():
            array.close()

    def remove(self) -> None:
        """The work is done, or nothing worth keeping was begun."""
        self.close()
        shutil.rmtree(self.folder)


def workspace_path(output: Path) -> Path:
    """The folder beside `output` that holds its unfinished run."""
    output = output.resolve()
    return output.with_name(output.name + ".unfinished")


@contextmanager
def open_workspace(output: Path, fingerprint: dict[str, object], restart: bool = False) -> Iterator[Workspace]:
    """The workspace of the run that makes `output`, new or found; nobody else may have it meanwhile.

    Args:
        fingerprint: what an unfinished run must agree with to be gone on with.
        restart: throw away what is there.

    Raises:
        UserError: when an unfinished run differs, naming how; when another process has it; when the folder is
            something else or cannot be made.
    """
    folder = workspace_path(output)
    try:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            workspace = Workspace(folder)
            _agree(workspace, fingerprint, restart)
            try:
                yield workspace
            finally:
                workspace.close()
    except BlockingIOError as error:
        raise UserError(f"another run is making {output}: {folder} is in use") from error
    except OSError as error:
        raise UserError(
            f"{folder}, where the unfinished run is kept, cannot be used ({error.strerror}); "
            "make room, then run the same command again"
        ) from error


def _agree(workspace: Workspace, fingerprint: dict[str, object], restart: bool) -> None:
    """Take up what is there, or begin, or refuse."""
    folder = workspace.folder
    strangers = [
        name for name in sorted(os.listdir(folder)) if name not in FILES and not name.startswith(".stablevsr-")
    ]
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which no unfinished run has: move it away")
    found = None if restart else workspace.noted("job")
    if found is None:
        for name in os.listdir(folder):
            if name != "lock":
                remove(folder / name)
        workspace.note("job", fingerprint)
        return
    for name, now in fingerprint.items():
        if found.get(name) != now:
            raise UserError(
                f"{folder} was begun with another {name} ({found.get(name)}, now {now}): "
                "give the same again, or start again with --restart"
            )
    for stale in folder.glob(".stablevsr-*.part"):  # of a process killed while writing
        remove(stale)
