"""Streaming a clip from file to file: flat in memory and disk, and continued after a kill.

The workspace holds the last finished frame (in the state), the pictures that are not yet safe in the outputs, and the
outputs so far (`Writer.keep`). A continued run reads the input again from a little before where it stopped.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.engine.outputs import Writers
from stablevsr.engine.plan import Output, require_room, size
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.state import RunState
from stablevsr.engine.store import DiskStore
from stablevsr.engine.stream import REMEMBERED, Stream
from stablevsr.engine.stream_reader import ReadAhead
from stablevsr.engine.workspace import Workspace
from stablevsr.errors import InputError
from stablevsr.media import Frame, Reader
from stablevsr.media.picture_file import SEGMENT
from stablevsr.runtime import to_device
from stablevsr.sampling.pictures import PictureFormat, in_model_range
from stablevsr.sampling.streaming import StreamState

log = logging.getLogger(__name__)


class StreamedFile:
    """A file that is streamed into outputs, in a new run or a continued one.

    Args:
        clip: can be read from its start.
        writers: just opened.

    Raises:
        ResourceError: for a disk that is too small.
    """

    def __init__(self, stream: Stream, clip: Reader, writers: Writers, store: DiskStore, workspace: Workspace) -> None:
        self._stream, self._clip, self._writers, self._store = stream, clip, writers, store
        self._format = PictureFormat(torch.uint16 if writers.is_deep else torch.uint8)
        shape = self._format.shape(SCALE * clip.height, SCALE * clip.width)
        # Frame i is at index i % SEGMENT: no later frame overwrites it before its segment is finished.
        self._pictures = store.array("pictures", shape, self._format.dtype, torch.device("cpu"))
        self._disk = SEGMENT * math.prod(shape) * self._format.dtype.itemsize
        self._state = store.load()
        if self._state.done == 0:  # later, part of it is already in use
            segments = [Output(workspace.folder, bound.per_frame) for bound in writers.bounds if bound.copies > 1]
            require_room(workspace.folder, self._disk, clip.frame_count or 1, [*writers.bounds, *segments])
        self._written = writers.keep(workspace)
        if self._state.done - self._written > SEGMENT:  # the machine went down, and writes were lost
            self._state = RunState("stream")

    def run(self, progress: OnProgress | None) -> int:
        """Do the remaining work; returns the number of frames of the clip."""
        done = self._state.done
        if done:
            log.info("continuing: %d frames are done", done)
        else:
            log.info("%s frames; temporary disk space: up to %s", self._clip.frame_count or "some", size(self._disk))
        first = max(0, min(self._written, done - REMEMBERED))
        frames = self._clip.frames_from(first)
        last = self._catch_up(first, done, frames)
        with ReadAhead(frames, self._stream.device) as low_res:
            for finished in self._stream.frames(low_res, last):
                index, picture = finished.state.frame, self._stream.picture(finished, self._format)
                self._pictures.write(index % SEGMENT, picture)
                self._write(index, picture, low_res.frame)
                self._save(finished.state)
                done = index + 1
                report(progress, Progress("stream", done, max(done, self._clip.frame_count or 0)))
        if done == 0:
            raise InputError(f"{self._clip.path} has no frames, expected at least 1")
        self._store.flush()
        return done

    def _catch_up(self, first: int, done: int, frames: Iterator[Frame]) -> StreamState | None:
        """Read frames `first` to `done` - 1, finished by an earlier process, and write those that it did not."""
        if self._state.tiled_since is not None:
            self._stream.decoder.fall_back()
        before: deque[Tensor] = deque(maxlen=REMEMBERED)
        for index, frame in zip(range(first, done), frames, strict=False):  # range first: consumes no extra frame
            before.append(in_model_range(torch.from_numpy(frame.image)))
            if index >= self._written:
                self._write(index, self._pictures.read(index % SEGMENT), frame)
        picture = self._state.picture
        if not before or picture is None:
            return None
        self._stream.recall(done - len(before), list(before))
        return StreamState(done - 1, to_device(before[-1], picture.device), picture)

    def _write(self, index: int, picture: Tensor, frame: Frame) -> None:
        if index >= self._written:
            self._store.later(lambda: self._writers.write(picture, frame))

    def _save(self, state: StreamState) -> None:
        since, now = self._state.tiled_since, False
        if since is None and self._stream.decoder.has_fallen_back:
            since, now = state.frame, True
        self._state = RunState("stream", state.frame + 1, picture=state.picture, tiled_since=since)
        self._store.save(self._state, now)
