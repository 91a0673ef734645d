"""Deinterlacing."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
from av.filter import Graph


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
                warnings.warn(
                    f"{name} is interlaced from frame {number} on; such frames are deinterlaced", stacklevel=2
                )
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
