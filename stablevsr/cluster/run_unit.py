"""Sampling one unit into a piece. What is unfinished is kept beside the piece, and continued by whoever comes next."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stablevsr.cluster.pieces import bound, write_piece
from stablevsr.cluster.units import ShiftedNoise, Unit
from stablevsr.config import SCALE
from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.borders import Neighbors, OuterBorders
from stablevsr.engine.plan import Plan, require_room
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.run import Run
from stablevsr.engine.state import RunState
from stablevsr.engine.store import Array, DiskStore
from stablevsr.engine.stream import Stream
from stablevsr.engine.workspace import ArrayFile, Busy, Workspace, open_workspace
from stablevsr.errors import OptionsError
from stablevsr.model import Model
from stablevsr.runtime import describe, to_device
from stablevsr.sampling.config import SamplingConfig, steps_within
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import PictureFormat
from stablevsr.sampling.streaming import StreamState

PATIENCE = 30.0  # seconds to wait for the lock of a process that was killed a moment ago, on another machine


@dataclass(frozen=True)
class Order:
    """All that is needed to sample a unit, besides model and frames."""

    unit: Unit
    size: tuple[int, int]  # height and width of the LR frames
    has_deep_frames: bool  # whether the LR frames have 16 bits
    is_deep: bool  # whether the pictures are to have 16 bits
    config: SamplingConfig
    clip: str  # digest of what the whole clip's run depends on
    run: str  # random name of the run, which tells apart two runs of the same clip

    @property
    def frame_type(self) -> torch.dtype:
        return torch.uint16 if self.has_deep_frames else torch.uint8

    @property
    def passes(self) -> int:
        """How often each frame is sampled."""
        return steps_within(self.config.steps, self.config.strength)

    @property
    def work(self) -> int:
        """Frame-steps."""
        return self.passes * self.unit.count


@dataclass(frozen=True)
class Made:
    """What has become of an order."""

    digest: str  # of the piece
    sampling: float  # seconds in the networks


@dataclass(frozen=True)
class PassMade:
    """How far a segment is."""

    passes: int  # done so far, of those that can be done apart: the last one ends with the piece
    given: Tensor | None  # (c, h, w) on the CPU, the estimate of the last of them that guides a neighbor
    sampling: float  # seconds in the networks
    made: Made | None  # after the last pass


class FrameFile:
    """LR frames in a file that many processes read, as an `engine.store.Array`.

    Args:
        path: holds (h, w, 3) uint8 or uint16 frames.
        first: the frame that counts as 0 here.
    """

    def __init__(self, path: Path, order: Order, first: int) -> None:
        self._file = ArrayFile(path, (*order.size, 3), order.frame_type)
        self._first = first

    def read(self, index: int) -> Tensor:
        return self._file.read(self._first + index)

    def write(self, index: int, value: Tensor) -> None:
        self._file.write(self._first + index, value)

    def prefetch(self, index: int) -> None:
        pass  # a frame is small beside a frame-step

    def close(self) -> None:
        self._file.close()


def run_unit(model: Model, order: Order, frames: Array, piece: Path, progress: OnProgress | None = None) -> Made:
    """Sample a unit, or continue it, and write its pictures to `piece`.

    Args:
        frames: the unit's LR frames, from index 0.

    Raises:
        UserError: as `upscale` does.
        Stopped: when `progress` returned False.
    """
    with _begun(model, order, frames, piece, progress) as work:
        return work.finish(work.stream if order.config.mode == "streaming" else work.sample)


def run_pass(
    model: Model,
    order: Order,
    index: int,
    frames: Array,
    piece: Path,
    border: Tensor | None,
    progress: OnProgress | None = None,
) -> PassMade:
    """Sample pass `index` of a segment; with the last one also write its pictures to `piece`.

    Does nothing if the pass has been done, or if another one has to be done first, as the result says.

    Args:
        frames: the segment's LR frames from index 0, and those of its neighbors beside them.
        border: (c, h, w), the estimate of the frame `Unit.source` in the pass before; None if there is none.

    Raises:
        UserError: as `upscale` does.
        Stopped: when `progress` returned False.
    """
    with _begun(model, order, frames, piece, progress) as work:
        return work.sample_pass(index, border)


@contextmanager
def _begun(model: Model, order: Order, frames: Array, piece: Path, progress: OnProgress | None) -> Iterator["_Work"]:
    """An order at work in its workspace, which is removed when the piece is there."""
    with ExitStack() as stack:
        workspace = _open(stack, piece)
        job: dict[str, object] = {"clip": order.clip, **describe(model)}
        try:
            workspace.begin(job)
        except OptionsError:  # begun on another kind of GPU, whose bits are others
            workspace.begin(job, restart=True)
        with DiskStore(workspace, model.device) as store:
            work = _Work(model, order, frames, piece, workspace, store, progress)
            yield work
        if work.is_finished:
            workspace.remove()


@dataclass
class _Work:
    """An order at work."""

    model: Model
    order: Order
    frames: Array
    piece: Path
    workspace: Workspace
    store: DiskStore
    progress: OnProgress | None
    is_finished: bool = False

    def finish(self, work: Callable[[], Iterator[Tensor]]) -> Made:
        """Do all that is left, and write the pictures."""
        start = time.monotonic()
        pictures = work()
        seconds = time.monotonic() - start
        digest = write_piece(self.piece, pictures, self.order.is_deep)
        self.is_finished = True
        return Made(digest, round(seconds, 3))

    def sample(self, run: Run | None = None) -> Iterator[Tensor]:
        """Do the work that is left; returns the pictures."""
        run = run or self._run()
        for event in run.events():
            report(self.progress, event)
        return run.pictures()

    def sample_pass(self, index: int, border: Tensor | None) -> PassMade:
        """See `run_pass`."""
        start, unit, last = time.monotonic(), self.order.unit, self.order.passes - 1
        shape = self.model.config.vae.latent_channels, *self.order.size
        borders = OuterBorders(self.store.array("borders", shape, torch.float32, self.model.device), border)
        run = self._run(borders)
        passes = {"flow": 0, "decode": last}.get(run.state.phase, run.state.done // unit.count)
        if passes == index == last:
            made = self.finish(lambda: self.sample(run))
            return PassMade(last + 1, None, made.sampling, made)
        if passes == index:
            self._sample_until(run, (index + 1) * unit.count)
            passes += 1
        given = passes > 0 and unit.given(passes - 1) is not None
        seconds = round(time.monotonic() - start, 3)
        return PassMade(passes, borders.left(passes - 1).cpu() if given else None, seconds, None)

    def stream(self) -> Iterator[Tensor]:
        """As `sample`, in streaming mode: the state holds the last picture; all are kept until the piece is written."""
        order, store = self.order, self.store
        count, form, low_res = order.unit.count, _format(order), self._low_res()
        shape = form.shape(*(SCALE * side for side in order.size))
        pictures = store.array("pictures", shape, form.dtype, torch.device("cpu"))
        config = replace(order.config, scene_cuts="off")  # the unit is one scene
        stream = Stream(self.model, config, order.size, noise=self._noise())
        state = store.load()
        done, last, tiled = state.done, None, state.tiled_since
        if state.picture is not None:
            last = StreamState(done - 1, to_device(low_res[done - 1], self.model.device), state.picture)
        else:
            require_room(self.workspace.folder, count * math.prod(shape) * form.dtype.itemsize, count, [])
        if tiled is not None:
            stream.decoder.fall_back()
        for finished in stream.frames((low_res[frame] for frame in range(done, count)), last):
            pictures.write(done, stream.picture(finished, form))
            fell_back = tiled is None and stream.decoder.has_fallen_back
            tiled = done if fell_back else tiled
            done += 1
            store.save(RunState("stream", done, picture=finished.state.picture, tiled_since=tiled), now=fell_back)
            report(self.progress, Progress("stream", done, count))
        return (pictures.read(frame) for frame in range(count))

    def _run(self, borders: OuterBorders | None = None) -> Run:
        order, unit = self.order, self.order.unit
        neighbors = None
        if borders is not None:
            neighbors = Neighbors(borders, self._low_res(unit.after), unit.before, unit.after)
        run = Run(
            self.model,
            self.store,
            order.config,
            self._low_res(),
            noise=self._noise(),
            format=_format(order),
            neighbors=neighbors,
        )
        is_new = run.state.phase == "flow" and run.state.done == 0
        height, width = (SCALE * side for side in order.size)
        piece = bound(self.workspace.folder, height, width, order.is_deep)
        self.store.kept = Plan.make(self.workspace, run.sizes(), is_new, unit.count, [piece]).kept
        return run

    def _sample_until(self, run: Run, until: int) -> None:
        """Do `until` frame-steps of a run, counted from its beginning."""
        if run.state.phase == "flow":
            for event in run.estimate_flows():
                report(self.progress, event)
        with closing(run.frame_steps()) as steps:
            for done, _ in enumerate(steps, run.state.done + 1):
                report(self.progress, Progress("denoise", done, run.num_frame_steps))
                if done == until:
                    return

    def _low_res(self, after: int = 0) -> LowResFrames:
        return LowResFrames(self.frames, self.order.unit.count + after, self.order.size)

    def _noise(self) -> ShiftedNoise:
        shape = (self.model.config.vae.latent_channels, *self.order.size)
        return ShiftedNoise(SeededNoise(self.order.config.seed, shape), self.order.unit.first)


def _format(order: Order) -> PictureFormat:
    return PictureFormat(torch.uint16 if order.is_deep else torch.uint8)


def _open(stack: ExitStack, piece: Path) -> Workspace:
    """The workspace of a piece; waits for a process that has just been killed to let go of it."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return stack.enter_context(open_workspace(piece))
        except Busy:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.5)


@contextmanager
def collecting_notices(found: list[str]) -> Iterator[None]:
    """Put the package's warnings into `found`, each once, instead of logging them: units repeat each other's."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.getMessage() not in found:
                found.append(record.getMessage())

    logger = logging.getLogger("stablevsr")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collector()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
