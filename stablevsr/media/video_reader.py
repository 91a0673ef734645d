"""A video file read as a clip, one decoded frame in memory at a time."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import Flags
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorTrc

from stablevsr.errors import UserError
from stablevsr.media.colour import bits, is_transparent, to_rgb
from stablevsr.media.deinterlacing import deinterlaced
from stablevsr.media.frame import Frame, Reader
from stablevsr.media.orientation import Orientation
from stablevsr.media.still import MAX_PIXELS
from stablevsr.media.truncation import missing_bytes

_HELP = "give a video file, an image or a folder of images"
_UNKNOWN_RATE = Fraction(25)
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)


# Old files have tags that are not UTF-8. PyAV 19 keeps their bytes; before, it raised unless told otherwise.
_TAG_OPTIONS = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


def open_input(path: Path) -> av.container.InputContainer:
    """Open a file for reading with FFmpeg; raises UserError when it makes no sense of it."""
    try:
        # Absolute, because FFmpeg would take "a:b.mp4" for a URL.
        return av.open(str(path.absolute()), **_TAG_OPTIONS)
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be opened as a video ({error.strerror}); {_HELP}.") from error


class VideoReader(Reader):
    """The first video stream of a file that is not cover art: turned upright, deinterlaced, converted to RGB.

    Opening decodes the first frame to learn the size; each pass then opens the file afresh. Raises UserError when the
    file is not a video, a frame cannot be decoded, or the picture's size changes on the way.
    """

    def __init__(self, path: Path, allow_truncated: bool = False, allow_hdr: bool = False) -> None:
        super().__init__(path)
        self._check_whole(allow_truncated)
        with self._open() as (container, stream):
            first = next(self._decode(container, stream), None)
            if first is None:
                raise UserError(f"{path} has a video stream without a single frame; {_HELP}.")
            if first.color_trc in HDR and not allow_hdr:
                raise UserError(
                    f"{path} is HDR video, which would come out with flat colours; "
                    "convert it to BT.709 first, or pass --allow-hdr."
                )
            self.frame_rate = stream.average_rate or stream.guessed_rate or _UNKNOWN_RATE
            self.time_base = stream.time_base
            self.sample_aspect_ratio = stream.sample_aspect_ratio or Fraction(1)
            self.frame_count = stream.frames or None
            self.has_audio = bool(container.streams.audio)
            self.is_deep = bits(first) > 8
            if first.color_trc in HDR:
                self.notices.append(f"{path}: HDR is read as if it were not, so colours will look flat.")
            if first.interlaced_frame:
                self.notices.append(f"{path} is interlaced; each of its frames becomes one whole picture (bwdif).")
            # VP9 keeps alpha beside the picture, where FFmpeg's decoder does not look.
            if stream.metadata.get("alpha_mode") == "1" or is_transparent(first):
                self.notices.append(f"{path}: the transparency of a video is dropped.")
        self.height, self.width = _upright_size(first)
        if _orientation(first).transpose:
            self.sample_aspect_ratio = 1 / self.sample_aspect_ratio

    def _check_whole(self, allow_truncated: bool) -> None:
        missing = missing_bytes(self.path)
        if missing and not allow_truncated:
            raise UserError(
                f"{self.path} is cut short: {missing} bytes are missing at its end; "
                "get the whole file, or pass --allow-truncated for what is there."
            )
        if missing:
            self.notices.append(f"{self.path} is cut short, {missing} bytes are missing at its end.")

    def _frames(self) -> Generator[Frame, None, None]:
        with self._open() as (container, stream):
            clock = _Clock(stream.start_time or 0, max(1, round(1 / (self.frame_rate * self.time_base))))
            frames = self._of_one_size(self._decode(container, stream))
            for number, decoded in enumerate(deinterlaced(frames, stream, self.path), 1):
                image = self._convert(decoded, number)
                time = clock.time_of(decoded, number == 1)
                yield Frame(image, pts=time, time_base=self.time_base, duration=decoded.duration or None)

    @contextmanager
    def _open(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        with open_input(self.path) as container:
            container.flags &= ~Flags.gen_pts.value  # its guesses put the frames of an AVI in the wrong order
            if container.format.name == "tty":  # FFmpeg plays any text file as a terminal's screen
                raise UserError(f"{self.path} is a text file; {_HELP}.")
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise UserError(f"{self.path} has no video stream; {_HELP}.")
            if streams[0].codec_context is None:
                raise UserError(f"{self.path} is in a video codec that cannot be decoded; convert it to H.264 first.")
            context = streams[0].codec_context
            if context.width * context.height > MAX_PIXELS:
                raise UserError(
                    f"{self.path} is {context.width}x{context.height}, but at most {MAX_PIXELS} pixels can be read; "
                    "make it smaller first."
                )
            yield container, streams[0]

    def _decode(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        frames = container.decode(stream)
        number = 1
        while True:
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                raise self._damaged(number) from error
            if frame is None:
                return
            if frame.is_corrupt:  # the decoder has made up what it could not read
                raise self._damaged(number)
            yield frame
            number += 1

    def _of_one_size(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        for number, frame in enumerate(frames, 1):
            height, width = _upright_size(frame)
            if (height, width) != (self.height, self.width):
                raise UserError(
                    f"Frame {number} of {self.path} is {width}x{height}, but the video began at "
                    f"{self.width}x{self.height}; cut it where the size changes."
                )
            yield frame

    def _damaged(self, number: int) -> UserError:
        return UserError(f"Frame {number} of {self.path} cannot be decoded; the file is damaged, so repair it first.")

    def _convert(self, decoded: av.VideoFrame, number: int) -> np.ndarray:
        try:
            image = to_rgb(decoded, self.is_deep)
        except av.FFmpegError as error:
            raise UserError(
                f"Frame {number} of {self.path} has colours that cannot be converted to RGB "
                f"({decoded.format.name}, matrix {decoded.colorspace}); convert the video to BT.709 first."
            ) from error
        return np.ascontiguousarray(_orientation(decoded).apply(image))


class _Clock:
    """Says when a frame is shown, also where the file does not: AVI stores times of decoding only, raw H.264 none.

    `start` and `step`: time of the first frame and distance of frames, used where nothing better is known.
    """

    def __init__(self, start: int, step: int) -> None:
        self._expected, self._step = start, step
        self._delay: int | None = None  # of the times of decoding; stays None where the file tells those of showing

    def time_of(self, frame: av.VideoFrame, first: bool) -> int:
        if first and frame.pts is None and frame.dts is not None:
            self._delay = frame.dts - self._expected
        time = frame.pts
        if self._delay is not None:
            time = None if frame.dts is None else frame.dts - self._delay
        if time is None:
            time = self._expected
        self._expected = time + self._step
        return time


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    size = frame.height, frame.width
    return size[::-1] if _orientation(frame).transpose else size


def _orientation(frame: av.VideoFrame) -> Orientation:
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    return Orientation() if matrix is None else Orientation.from_display_matrix(np.frombuffer(matrix, np.int32))
