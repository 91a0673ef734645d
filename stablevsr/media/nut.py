"""Video through pipes as NUT, FFmpeg's own container: frames have times there, and may be compressed."""

from collections.abc import Generator
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

from stablevsr.errors import IncompleteOutput, InputError
from stablevsr.media.colour import to_rgb
from stablevsr.media.demuxing import exact
from stablevsr.media.frame import Frame, Reader
from stablevsr.media.pipe import HOW, PIPE, PipeReader, Source, require_readable, standard_input

_FIRST = b"n"  # of "nut/multimedia container"
_USUAL_RATE = Fraction(25)  # where neither stream nor time base tell
# Else FFmpeg reads many frames before it gives the first one, to guess their rate from.
_NO_PROBING = {"fpsprobesize": "0"}


class _Resumed:
    """A stream of which the beginning has been read."""

    def __init__(self, begun: bytes, stream: Source) -> None:
        self._begun, self._stream = begun, stream

    def read(self, size: int) -> bytes:
        begun, self._begun = self._begun, b""
        return begun or self._stream.read(size) or b""

    def close(self) -> None:
        self._stream.close()


class _Interruptible:
    """A stream for PyAV, which ignores Ctrl-C inside a read, and reads again: here the stream ends there."""

    def __init__(self, stream: Source) -> None:
        self._stream, self._is_interrupted = stream, False

    def read(self, size: int) -> bytes:
        try:
            return b"" if self._is_interrupted else self._stream.read(size) or b""
        except KeyboardInterrupt:
            self._is_interrupted = True
            return b""

    def require_uninterrupted(self) -> None:
        """Raise what `read` did not."""
        if self._is_interrupted:
            raise KeyboardInterrupt


def open_pipe(stream: BinaryIO | None = None) -> Reader:
    """A reader for what comes through a pipe, NUT or yuv4mpegpipe.

    Args:
        stream: unbuffered; None is standard input.

    Raises:
        UserError: as the readers do.
    """
    source = standard_input() if stream is None else stream
    begun = source.read(1) or b""
    resumed = _Resumed(begun, source)
    return NutReader(resumed) if begun == _FIRST else PipeReader(resumed)


class NutReader(Reader):
    """Frames from a NUT pipe, as they come; can be read once. The first video stream is taken, and nothing else.

    Raises:
        InputError: when opened, for what FFmpeg cannot read or decode, and for pictures that are too large.
        IncompleteOutput: when read, for a stream that is cut or damaged, or that changes its size.
    """

    def __init__(self, stream: Source) -> None:
        super().__init__(PIPE)
        self._resources.callback(stream.close)
        self._stream = _Interruptible(stream)
        try:
            container = av.open(self._stream, "r", format="nut", container_options=_NO_PROBING)
        except av.FFmpegError as error:
            raise InputError(f"standard input cannot be read as NUT ({error.strerror}): {HOW}") from error
        finally:
            self._stream.require_uninterrupted()
        self._resources.callback(container.close)
        videos = [video for video in container.streams.video if video.codec_context is not None]
        if not videos or videos[0].format is None:
            raise InputError(f"standard input holds no video that can be decoded: {HOW}")
        self._container, self._video = container, videos[0]
        self._video.thread_type = "SLICE"  # threads by frame would hold back as many frames
        self.width, self.height = self._video.width, self._video.height
        require_readable(self.width, self.height)
        self.time_base = exact(self._video.time_base or 1 / _USUAL_RATE)
        self.frame_rate = exact(self._video.average_rate or self._video.guessed_rate or _USUAL_RATE)
        self.sample_aspect_ratio = exact(self._video.sample_aspect_ratio or Fraction(1))
        self.frame_count = None
        self.pixel_format = self._video.format.name
        self.is_deep = max(each.bits for each in self._video.format.components) > 8
        others = len(container.streams) - 1
        if others:
            self.notices.append(f"standard input holds {others} more streams, which are left out: only video is read")

    def _frames(self) -> Generator[Frame, None, None]:
        number, start = 0, 0
        try:
            for decoded in self._container.decode(self._video):
                if (decoded.width, decoded.height) != (self.width, self.height):
                    raise IncompleteOutput(
                        f"frame {number + 1} of standard input is {decoded.width}x{decoded.height}, expected "
                        f"{self.width}x{self.height} as before: the {number} so far are done, give one video of one "
                        "size"
                    )
                assert decoded.pts is not None  # NUT stores the times of all frames
                start = decoded.pts if number == 0 else start
                image = np.ascontiguousarray(to_rgb(decoded, self.is_deep))
                yield Frame(image, pts=decoded.pts - start, time_base=self.time_base, duration=decoded.duration or None)
                number += 1
        except av.FFmpegError as error:
            raise IncompleteOutput(
                f"standard input is cut or damaged at frame {number + 1} ({error.strerror}): the {number} before it "
                "are done"
            ) from error
        finally:
            self._stream.require_uninterrupted()
