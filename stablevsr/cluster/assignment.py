"""Units on their way to a worker and back, and what the segments of a scene leave for each other."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stablevsr.atomic import remove, replacing
from stablevsr.cluster.job import Job
from stablevsr.cluster.pieces import Record, remove_piece
from stablevsr.cluster.units import Unit
from stablevsr.engine.array_file import using
from stablevsr.engine.progress import Progress
from stablevsr.engine.workspace import workspace_path


class Scene:
    """What crosses the borders between the segments of a scene: an estimate for each border and pass.

    The newest ones travel as references to Ray's objects, from worker to worker. All are kept as files too, until the
    scene is finished, so that a segment whose worker died, or a run whose driver died, goes on.

    Args:
        units: the segments, some of which may be finished.
    """

    def __init__(self, job: Job, units: list[Unit]) -> None:
        self.is_given_up = False
        self.length = units[-1].last - units[0].first  # in frames
        self.units = units
        self._job, self._folder = job, job.workspace.folder / "units"
        self._references: dict[tuple[int, int], Any] = {}  # by frame and pass
        names = set(os.listdir(self._folder))
        self._kept = {key for unit in units for key in self._given(unit) if self._path(*key).name in names}
        if not all(self._can_go_on(unit) for unit in units):
            self._discard()

    def has(self, unit: Unit, index: int) -> bool:
        """Whether a segment can do pass `index`."""
        source = unit.source(index)
        return source is None or (source, index - 1) in self._kept

    def border(self, unit: Unit, index: int) -> Any:
        """The estimate that a segment needs in pass `index`, (c, h, w), or a reference to it; None if it needs none."""
        source = unit.source(index)
        if source is None:
            return None
        key = source, index - 1
        if key in self._references:
            return self._references[key]
        with using(self._path(*key)):
            return np.load(self._path(*key))

    def keep(self, unit: Unit, index: int, reference: Any, value: np.ndarray) -> None:
        """Keep what pass `index` of a segment leaves, and a reference to it."""
        frame = unit.given(index)
        assert frame is not None
        path = self._path(frame, index)
        with using(path), replacing(path) as part, part.open("wb") as file:
            np.save(file, value)
        self._kept.add((frame, index))
        self._references[frame, index] = reference
        self._references.pop((frame, index - 2), None)  # its neighbor could not do without

    def forget_references(self) -> None:
        """Use the files from now on: objects may have gone with a machine."""
        self._references.clear()

    def finish_if_complete(self) -> None:
        """Delete what no segment needs any longer."""
        if all(self._job.record(unit) for unit in self.units):
            self._references.clear()
            for key in self._kept:
                remove(self._path(*key))

    def _can_go_on(self, unit: Unit) -> bool:
        """Whether a finished segment has left all that its neighbors may need, if these are not finished."""
        others = [other for other in self.units if other.first == unit.last or other.last == unit.first]
        if self._job.record(unit) is None or all(self._job.record(other) for other in others):
            return True
        return self._kept.issuperset(self._given(unit))

    def _discard(self) -> None:
        """Begin again, because somebody deleted a part."""
        for unit in self.units:
            remove_piece(self._job.piece(unit))
            shutil.rmtree(workspace_path(self._job.piece(unit)), ignore_errors=True)
        for key in self._kept:
            remove(self._path(*key))
        self._kept.clear()

    def _given(self, unit: Unit) -> list[tuple[int, int]]:
        """What a segment leaves for others, by frame and pass."""
        found = [(unit.given(index), index) for index in range(self._job.order(unit).passes - 1)]
        return [(frame, index) for frame, index in found if frame is not None]

    def _path(self, frame: int, index: int) -> Path:
        return self._folder / f"{frame:07d}.{index}.npy"


@dataclass(eq=False)
class Assignment:
    """A unit on its way."""

    job: Job
    unit: Unit
    scene: Scene | None = None  # of a segment, which is handed out pass by pass
    passes: int = 0  # done, as far as is known
    home: object = None  # the only worker that has the segment's state; None if it lies where all see it
    failures: list[str] = field(default_factory=list)  # reasons
    done: int = 0  # frame-steps
    seconds: float = 0.0  # of all passes, from the order to its result
    sampling: float = 0.0  # of these, in the networks
    notices: dict[str, None] = field(default_factory=dict)  # in order, each once
    record: Record | None = None  # once it is finished
    is_given_up: bool = False
    work: int = field(init=False)  # frame-steps; asked for at every written frame, so it is not counted anew
    num_passes: int = field(init=False)

    def __post_init__(self) -> None:
        order = self.job.order(self.unit)
        self.work, self.num_passes = order.work, order.passes

    @property
    def length(self) -> int:
        """The number of frames that wait for it: the longest are handed out first."""
        return self.unit.count if self.scene is None else self.scene.length

    @property
    def title(self) -> str:
        """Short, for a line on the terminal."""
        return f"{self.job.input.name}, {self.unit}"

    @property
    def is_ready(self) -> bool:
        return self.scene is None or self.scene.has(self.unit, self.passes)

    def __str__(self) -> str:
        text = f"{self.job.input}, {self.unit}"
        return text if self.scene is None else f"{text}, pass {self.passes + 1} of {self.num_passes}"

    def note(self, progress: Progress | None) -> None:
        """Update `done`."""
        if progress is not None and progress.phase in ("denoise", "stream", "decode"):
            per_unit = {"denoise": 1, "stream": self.num_passes}.get(progress.phase)
            self.done = self.work if per_unit is None else per_unit * progress.done


@dataclass(frozen=True)
class AtWork:
    """What a worker is doing, for those who watch."""

    number: int  # of the worker, from 1
    machine: str
    unit: str = ""  # empty if it waits for one
    done: int = 0  # frame-steps
    total: int = 0
