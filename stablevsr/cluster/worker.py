"""What runs on the other machines: a Ray actor with a model of its own. This module does not import Ray."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from stablevsr.cluster.description import ModelDescription, gpu_name, machine_name
from stablevsr.cluster.run_unit import FrameFile, Made, Order, collecting_notices, run_pass, run_unit
from stablevsr.cluster.units import Unit
from stablevsr.engine.progress import Progress
from stablevsr.errors import ResourceError
from stablevsr.model import Model


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    machine: str
    process: int
    gpu: str | None = None

    def __str__(self) -> str:
        return f"{self.machine} (process {self.process}{f', {self.gpu}' if self.gpu else ''})"


@dataclass(frozen=True)
class Outcome:
    """What a worker has done."""

    made: Made | None  # None for a segment of which passes are left
    size: int  # of the piece, in bytes
    sampling: float = 0.0  # seconds in the networks
    passes: int = 0  # of a segment that are done
    notices: Sequence[str] = field(default=())


class Worker:
    """Samples one unit at a time; `progress` may be called meanwhile.

    Where the folder of the run is out of reach, the order of calls for a unit is `begin`, `take` for all frames,
    `run`, `read` for the whole piece, `end`. A segment has a `run` for each pass, with others in between.

    Args:
        threads: on the CPU.
    """

    def __init__(self, description: ModelDescription, threads: int) -> None:
        self._description, self._threads = description, threads
        self._model: Model | None = None
        self._progress: Progress | None = None
        self._own: dict[tuple[str, Unit], tempfile.TemporaryDirectory] = {}  # of units whose files are elsewhere
        self._given: np.ndarray | None = None

    def place(self) -> Place:
        return Place(machine_name(), os.getpid())

    def facts(self) -> dict[str, str]:
        """What must be the same as on the driver's machine."""
        return self._description.facts()

    def build(self) -> Place:
        """Build the model; raises as `build_model` does."""
        if self._description.device == "cpu":
            torch.set_num_threads(self._threads)
        self._model = self._description.build()
        return Place(machine_name(), os.getpid(), gpu_name(self._model))

    def sees(self, folder: str, token: str) -> bool:
        """Whether the folder of a run is here the very same one, and can be written to."""
        try:
            return token in (Path(folder) / "probe.json").read_text() and os.access(folder, os.W_OK | os.X_OK)
        except OSError:
            return False

    def begin(self, order: Order) -> None:
        """Make room for a unit whose frames are sent."""
        self.end(order)
        try:
            folder = tempfile.TemporaryDirectory(prefix="stablevsr-", ignore_cleanup_errors=True)
        except OSError as error:
            raise ResourceError(f"no folder for temporary files ({error.strerror}): make room") from error
        self._own[order.run, order.unit] = folder
        self._frames(order).touch()

    def take(self, order: Order, index: int, frames: np.ndarray) -> None:
        """Store LR frames, (n, h, w, 3), from number `index` of the unit on; -1 is a neighbor's."""
        file = FrameFile(self._frames(order), order, order.unit.before)
        for offset, frame in enumerate(frames):
            file.write(index + offset, torch.from_numpy(frame.copy()))
        file.close()

    def run(
        self,
        order: Order,
        frames: str | None,
        piece: str | None,
        index: int | None = None,
        border: np.ndarray | None = None,
    ) -> Outcome:
        """Sample a unit, or one pass of a segment.

        Args:
            frames: the file with the LR frames of the clip; None if they were sent.
            piece: where to write the pictures; None if they will be read.
            index, border: of the pass, see `run_pass`.
        """
        assert self._model is not None
        notices: list[str] = []
        self._progress = self._given = None
        path = Path(piece) if piece else self._piece(order)
        place = (Path(frames), order.unit.first) if frames else (self._frames(order), order.unit.before)
        file = FrameFile(place[0], order, place[1])
        try:
            with collecting_notices(notices):
                if index is None:
                    made = run_unit(self._model, order, file, path, self._report)
                    return Outcome(made, path.stat().st_size, made.sampling, order.passes, notices)
                given = None if border is None else torch.from_numpy(border.copy())
                done = run_pass(self._model, order, index, file, path, given, self._report)
        finally:
            file.close()
        self._given = None if done.given is None else done.given.numpy()
        size = path.stat().st_size if done.made else 0
        return Outcome(done.made, size, done.sampling, done.passes, notices)

    def given(self) -> np.ndarray | None:
        """What the last pass of `run` leaves for a neighbor: (c, h, w) float32."""
        return self._given

    def read(self, order: Order, offset: int, size: int) -> bytes:
        """A part of the piece."""
        with self._piece(order).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def end(self, order: Order) -> None:
        """Delete what belongs to the unit."""
        folder = self._own.pop((order.run, order.unit), None)
        if folder is not None:
            folder.cleanup()

    def close(self) -> None:
        """Delete everything that is this worker's own, before it is killed."""
        for folder in list(self._own.values()):
            folder.cleanup()

    def progress(self) -> Progress | None:
        """How far the unit is."""
        return self._progress

    def _report(self, progress: Progress) -> None:
        self._progress = progress

    def _frames(self, order: Order) -> Path:
        return Path(self._own[order.run, order.unit].name) / "frames.raw"

    def _piece(self, order: Order) -> Path:
        return Path(self._own[order.run, order.unit].name) / "piece.mkv"
