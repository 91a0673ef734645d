"""From stored pictures to displayed ones: orientation and deinterlacing."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import av
import numpy as np
from av.filter import Graph

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Orientation:
    """Swap rows and columns, then mirror left-right (flip_x), then mirror top-bottom (flip_y)."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def from_exif(cls, tag: object) -> Self:
        """From EXIF tag 274; unknown values count as upright, as in viewers."""
        return cls(*_EXIF.get(tag, ())) if isinstance(tag, int) else cls()

    @classmethod
    def from_display_matrix(cls, matrix: np.ndarray) -> Self:
        """From FFmpeg's nine numbers: stored (x, y) is shown at (m0 x + m3 y, m1 x + m4 y); nearest quarter turn."""
        a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
        if abs(b) > abs(a):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return `image` (h, w, ...) upright, as (w, h, ...) if transposed; a view."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


_EXIF = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def deinterlaced(
    frames: Iterable[av.VideoFrame], stream: av.VideoStream, name: Path, skipped: int = 0
) -> Iterator[av.VideoFrame]:
    """Deinterlace frames one for one with FFmpeg's bwdif, from the first interlaced frame on.

    bwdif passes progressive frames through. Times are those of the input; two frames are held back. `skipped`: frames
    of the file that come before these.
    """
    graph: Graph | None = None
    waiting: deque[av.VideoFrame] = deque()
    for number, frame in enumerate(frames, skipped + 1):
        if graph is None:
            if not frame.interlaced_frame:
                yield frame
                continue
            if number > skipped + 1:  # the reader reports clips that are interlaced from the start
                log.warning("%s is interlaced from frame %d on: such frames are deinterlaced", name, number)
            graph = _bwdif(frame, stream)
        waiting.append(frame)
        graph.push(frame)
        yield from _finished(graph, waiting)
    if graph is not None:
        graph.push(None)
        yield from _finished(graph, waiting)


def _bwdif(frame: av.VideoFrame, stream: av.VideoStream) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base)
    chain = [source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")]
    graph.link_nodes(*chain).configure()
    return graph


def _finished(graph: Graph, waiting: deque[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):  # it needs more input, or has no more output
            return
        assert isinstance(frame, av.VideoFrame)
        given = waiting.popleft()
        # The filter counts in half units and guesses the times of frames that have none.
        frame.pts, frame.dts, frame.time_base, frame.duration = given.pts, given.dts, given.time_base, given.duration
        yield frame
