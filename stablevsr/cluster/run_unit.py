"""Sampling one unit into a piece. What is unfinished is kept beside the piece, and continued by whoever comes next."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stablevsr.cluster.pieces import bound, write_piece
from stablevsr.cluster.units import ShiftedNoise, Unit
from stablevsr.config import SCALE
from stablevsr.engine.arrays import LowResFrames
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
from stablevsr.sampling.config import SamplingConfig
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

    @property
    def frame_type(self) -> torch.dtype:
        return torch.uint16 if self.has_deep_frames else torch.uint8

    @property
    def work(self) -> int:
        """Frame-steps."""
        return self.config.steps * self.unit.count


@dataclass(frozen=True)
class Made:
    """What has become of an order."""

    digest: str  # of the piece
    sampling: float  # seconds in the networks


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
    with ExitStack() as stack:
        workspace = _open(stack, piece)
        job: dict[str, object] = {"clip": order.clip, **describe(model)}
        try:
            workspace.begin(job)
        except OptionsError:  # begun on another kind of GPU, whose bits are others
            workspace.begin(job, restart=True)
        with DiskStore(workspace, model.device) as store:
            start = time.monotonic()
            low_res = LowResFrames(frames, order.unit.count, order.size)
            sample = _stream if order.config.mode == "streaming" else _sample
            pictures = sample(model, order, low_res, workspace, store, progress)
            seconds = time.monotonic() - start
            digest = write_piece(piece, pictures, order.is_deep)
        workspace.remove()
    return Made(digest, round(seconds, 3))


def _sample(
    model: Model,
    order: Order,
    low_res: LowResFrames,
    workspace: Workspace,
    store: DiskStore,
    progress: OnProgress | None,
) -> Iterator[Tensor]:
    """Do the work; returns the pictures."""
    run = Run(model, store, order.config, low_res, noise=_noise(model, order), format=_format(order))
    is_new = run.state.phase == "flow" and run.state.done == 0
    height, width = (SCALE * side for side in order.size)
    piece = bound(workspace.folder, height, width, order.is_deep)
    store.kept = Plan.make(workspace, run.sizes(), is_new, order.unit.count, [piece]).kept
    for event in run.events():
        report(progress, event)
    return run.pictures()


def _stream(
    model: Model,
    order: Order,
    low_res: LowResFrames,
    workspace: Workspace,
    store: DiskStore,
    progress: OnProgress | None,
) -> Iterator[Tensor]:
    """As `_sample`, in streaming mode: the state holds the last picture; all are kept until the piece is written."""
    count, form = order.unit.count, _format(order)
    shape = form.shape(*(SCALE * side for side in order.size))
    pictures = store.array("pictures", shape, form.dtype, torch.device("cpu"))
    config = replace(order.config, scene_cuts="off")  # the unit is one scene
    stream = Stream(model, config, order.size, noise=_noise(model, order))
    state = store.load()
    done, last, tiled = state.done, None, state.tiled_since
    if state.picture is not None:
        last = StreamState(done - 1, to_device(low_res[done - 1], model.device), state.picture)
    else:
        require_room(workspace.folder, count * math.prod(shape) * form.dtype.itemsize, count, [])
    if tiled is not None:
        stream.decoder.fall_back()
    for finished in stream.frames((low_res[frame] for frame in range(done, count)), last):
        pictures.write(done, stream.picture(finished, form))
        fell_back = tiled is None and stream.decoder.has_fallen_back
        tiled = done if fell_back else tiled
        done += 1
        store.save(RunState("stream", done, picture=finished.state.picture, tiled_since=tiled), now=fell_back)
        report(progress, Progress("stream", done, count))
    return (pictures.read(frame) for frame in range(count))


def _noise(model: Model, order: Order) -> ShiftedNoise:
    shape = (model.config.vae.latent_channels, *order.size)
    return ShiftedNoise(SeededNoise(order.config.seed, shape), order.unit.first)


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
