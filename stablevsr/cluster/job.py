"""One clip of a run on several machines: its workspace, its units, and how their pictures become the output."""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from stablevsr.atomic import restore
from stablevsr.cluster.pieces import Record, bound, read_piece, read_record
from stablevsr.cluster.run_unit import Order
from stablevsr.cluster.units import Unit, cuts_of_stream, units_between
from stablevsr.config import SCALE, ModelConfig
from stablevsr.engine.fingerprint import shared_fingerprint
from stablevsr.engine.ingest import Footage, ingest
from stablevsr.engine.outputs import Writers, needs_even_sides
from stablevsr.engine.plan import Output, require_room
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.store import DiskStore
from stablevsr.engine.upscale import run_to_end
from stablevsr.engine.workspace import Workspace, open_workspace, turn
from stablevsr.errors import IncompleteOutput, ResourceError
from stablevsr.media import Encoding, Reader, check_output, open_reader
from stablevsr.sampling.config import SamplingConfig
from stablevsr.sampling.resizing import output_size
from stablevsr.sampling.segments import segment_starts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What all clips of a run share."""

    config: SamplingConfig
    model: ModelConfig
    machine: dict[str, str] = field(default_factory=dict)  # filled in by the run from `ModelDescription.facts`
    encoding: Encoding | None = None
    force: bool = False  # replace outputs that exist
    restart: bool = False  # discard unfinished runs
    keep_workspace: bool = False
    open_clip: Callable[[Path], AbstractContextManager[Reader]] = open_reader


@dataclass
class Result:
    """A clip and what became of it."""

    input: Path
    output: Path
    frames: int = 0
    seconds: float = 0.0
    error: str = ""
    units: list[dict[str, object]] = field(default_factory=list)  # who did what: see `pieces.Record`


class Job:
    """A clip in its workspace. Use `open_job`."""

    def __init__(
        self,
        clip: Path,
        output: Path,
        setting: Setting,
        workspace: Workspace,
        side_by_side: Path | None,
        has_segments: bool,
    ) -> None:
        self.input, self.output, self.setting, self.workspace = clip, output, setting, workspace
        self._side_by_side, self._has_segments = side_by_side, has_segments
        self.units: list[Unit] = []
        self.token = ""  # in probe.json
        self._digest = ""
        self._size = (0, 0)
        self._has_deep_frames = self._is_deep = False

    @property
    def frames(self) -> int:
        return self.units[-1].last

    @property
    def frames_path(self) -> Path:
        """The file of all LR frames."""
        return self.workspace.folder / "frames.raw"

    def order(self, unit: Unit) -> Order:
        config = self.setting.config
        return Order(unit, self._size, self._has_deep_frames, self._is_deep, config, self._digest, self.token)

    def piece(self, unit: Unit) -> Path:
        """Where the pictures of a unit are, once it is finished."""
        return self.workspace.folder / "units" / f"{unit.first:07d}.mkv"

    def record(self, unit: Unit) -> Record | None:
        """How a unit was made; None if it is not finished."""
        return read_record(self.piece(unit))

    def missing(self) -> list[Unit]:
        """The units that are not finished."""
        return [unit for unit in self.units if self.record(unit) is None]

    def prepare(self, progress: OnProgress | None) -> None:
        """Check the output, read the clip and find its scenes, unless that has been done."""
        setting = self.setting
        with setting.open_clip(self.input) as clip:
            setting.config.check(setting.model, clip.frame_count)
            bounds = self._rehearse(clip)
            division = "into segments" if self._has_segments else "into scenes"
            job = shared_fingerprint(setting.machine, clip, setting.config, division)
            self.workspace.begin(job, setting.restart)
            self._digest = hashlib.sha256(json.dumps(job, default=str).encode()).hexdigest()
            self._size, self._has_deep_frames = (clip.height, clip.width), clip.is_deep
            with DiskStore(self.workspace, torch.device("cpu")) as store:
                footage = run_to_end(ingest(store, self.workspace, clip, setting.config), progress)
                setting.config.check(setting.model, len(footage.frames))
                self.units = self._divide(footage)
            self.workspace.close()
        (self.workspace.folder / "units").mkdir(exist_ok=True)
        if not any(self.record(unit) for unit in self.units):
            height, width = (SCALE * side for side in self._size)
            piece = bound(self.workspace.folder, height, width, self._is_deep)
            require_room(self.workspace.folder, 0, self.frames, [*bounds, piece])
        self.token = (self.workspace.noted("probe") or {}).get("token", "")
        if not self.token:
            self.token = secrets.token_hex(16)
            self.workspace.note("probe", {"token": self.token})

    def joining(self, progress: OnProgress | None) -> Generator[Unit, None, None]:
        """Write the output. Yields each unit before its pictures are needed; after the last, the output is in place.

        Raises:
            IncompleteOutput: when sound or another stream could not be added to it.
        """
        setting, workspace = self.setting, self.workspace
        with setting.open_clip(self.input) as clip, ExitStack() as stack:
            writers = self._open_writers(stack, clip)
            store = stack.enter_context(DiskStore(workspace, torch.device("cpu")))
            footage = run_to_end(ingest(store, workspace, clip, setting.config), None)
            for unit in self.units:
                yield unit
                record = self.record(unit)
                assert record is not None  # the caller has waited for it
                pictures = read_piece(self.piece(unit), record, self._is_deep)
                for index, picture in enumerate(pictures, unit.first):
                    writers.write(picture, footage.frame(index))
                    report(progress, Progress("write", index + 1, self.frames))
        if not setting.keep_workspace:
            workspace.remove()
        if writers.failures:
            raise IncompleteOutput(f"{self.output} is written, but not all of it: {'; '.join(writers.failures)}")

    def result(self) -> Result:
        """What has been done of it so far; call before the workspace goes."""
        records = [(unit, self.record(unit)) for unit in self.units]
        done = [{"first": unit.first, "last": unit.last, **asdict(record)} for unit, record in records if record]
        return Result(self.input, self.output, self.frames, units=done)

    def _open_writers(self, stack: ExitStack, clip: Reader) -> Writers:
        setting, side = self.setting, self._side_by_side
        size = output_size(setting.config, clip.height, clip.width, needs_even_sides(self.output, side))
        return Writers.open(stack, self.workspace, clip, self.output, side, setting.encoding, setting.force, size)

    def _rehearse(self, clip: Reader) -> list[Output]:
        """Find out early what the outputs refuse, and how much space they take."""
        with suppress(_Rehearsed), ExitStack() as stack:
            writers = self._open_writers(stack, clip)
            for notice in writers.result.notices:
                log.warning("%s", notice)
            self._is_deep = writers.is_deep
            raise _Rehearsed  # closed without an error, they would be finished
        return writers.bounds

    def _divide(self, footage: Footage) -> list[Unit]:
        known = self.workspace.noted("units")
        if known is None:
            is_stream = self.setting.config.mode == "streaming"
            cuts = cuts_of_stream(self.setting.config, footage.frames) if is_stream else footage.cuts
            known = {"cuts": cuts}
            self.workspace.note("units", known)
        cuts, count = known["cuts"], len(footage.frames)
        starts = segment_starts(self.setting.config.segments, cuts, count) if self._has_segments else []
        return units_between(cuts, count, starts)


class _Rehearsed(Exception):
    """Ends a rehearsal."""


@contextmanager
def open_job(
    clip: Path,
    output: Path,
    setting: Setting,
    *,
    shared: bool = False,
    side_by_side: Path | None = None,
    progress: OnProgress | None = None,
) -> Iterator[Job]:
    """The job that writes `output`, begun or continued, with the clip read and its scenes found.

    Args:
        shared: with other processes. Segments of a scene are then not divided, as their work is not one process's.

    Raises:
        UserError: as `upscale` does before it starts.
    """
    for path in filter(None, (output, side_by_side)):
        restore(path)
        check_output(path, clip, setting.force)
    with open_workspace(output, shared) as workspace:
        has_segments = setting.config.segments is not None and not shared
        job = Job(clip, output, setting, workspace, side_by_side, has_segments)
        with turn(workspace) if shared else nullcontext(True) as is_there:
            if not is_there:
                raise ResourceError(f"{output} was finished by another process just now")
            try:
                job.prepare(progress)
            except BaseException:
                if not workspace.has_begun() or (workspace.is_ours and workspace.noted("clip") is None):
                    workspace.remove()
                raise
        yield job


def is_finished(output: Path) -> bool:
    """Whether there is an output, complete as always."""
    return any(output.iterdir()) if output.is_dir() else output.exists()
