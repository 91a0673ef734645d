"""Video through pipes as yuv4mpegpipe: a line of text, then every frame uncompressed, after a line of its own.

`ffmpeg -i IN -f yuv4mpegpipe -strict -1 -` writes it; FFmpeg, ffplay, mpv and encoders read it. It has no sound and
says nothing of the matrix of YUV, so that both directions go by the size of the picture, see `colour.matrix_for`.
"""

import os
import sys
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Protocol, Self

import av
import numpy as np
from av.video.reformatter import ColorRange

from stablevsr.errors import IncompleteOutput, InputError, OptionsError, ResourceError
from stablevsr.media.colour import matrix_for, to_frame, to_rgb
from stablevsr.media.frame import Frame, Reader
from stablevsr.media.still_reader import MAX_PIXELS

PIPE = Path("-")  # what stands for standard input and output on the command line
_MAGIC = b"YUV4MPEG2"
_LONGEST_LINE = 4096  # bytes, of a header; anything longer is none
_LARGEST = 2**31  # of FFmpeg's numbers
_USUAL_RATE = Fraction(25)  # where the header leaves it open
_SUBSAMPLINGS = {"411": "yuv411p", "420": "yuv420p", "422": "yuv422p", "444": "yuv444p", "mono": "gray"}
_SITINGS = ("420jpeg", "420mpeg2", "420paldv")  # where chroma sits, which swscale does not ask
_DEPTHS = (9, 10, 12, 14, 16)
PIXEL_FORMATS = {  # the header's name -> FFmpeg's
    **_SUBSAMPLINGS,
    **dict.fromkeys(_SITINGS, "yuv420p"),
    **{f"{name}p{depth}": f"{_SUBSAMPLINGS[name]}{depth}le" for name in ("420", "422", "444") for depth in _DEPTHS},
    **{f"mono{depth}": f"gray{depth}le" for depth in (9, 10, 12, 16)},
}
_CLOSED = (AttributeError, OSError, ValueError)  # of a standard stream that is None, a notebook's, or closed since
HOW = "write it with ffmpeg -i INPUT -f yuv4mpegpipe -strict -1 -"


def standard_input() -> BinaryIO:
    """Standard input without a buffer; `OptionsError` if it is closed, or a terminal."""
    try:
        if sys.stdin.isatty():
            raise OptionsError(f"standard input is a terminal, expected video from a pipe: {HOW} | ...")
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    except _CLOSED as error:
        raise OptionsError(f"standard input is closed, expected video from a pipe: {HOW} | ...") from error


def standard_output() -> BinaryIO:
    """Standard output; `OptionsError` if it is closed, or a terminal."""
    try:
        if sys.stdout.isatty():
            raise OptionsError("standard output is a terminal, which shows no video: add | ffplay -, or give a file")
        os.fstat(sys.stdout.fileno())
        return sys.stdout.buffer
    except _CLOSED as error:
        raise OptionsError("standard output is closed: add | ffplay -, or give a file") from error


def require_readable(width: int, height: int) -> None:
    """`InputError` for pictures on standard input that are too large."""
    if width * height > MAX_PIXELS:
        raise InputError(
            f"standard input is {width}x{height}, but at most {MAX_PIXELS} pixels can be read: make it smaller first"
        )


class Source(Protocol):
    """Bytes from a pipe."""

    def read(self, size: int, /) -> bytes | None:
        """At most `size` bytes: as many as there are, but at least one; none at the end."""
        ...

    def close(self) -> None: ...


class PipeReader(Reader):
    """Frames from a pipe, as they come; can be read once.

    Args:
        stream: unbuffered, so that a frame is there as soon as its last byte is; None is standard input.

    Raises:
        InputError: when opened, for what is no yuv4mpegpipe and for pixel formats that are not read.
        IncompleteOutput: when read, for a stream that is cut in the middle of a frame, or that begins anew.
    """

    def __init__(self, stream: Source | None = None) -> None:
        super().__init__(PIPE)
        self._stream = stream or standard_input()
        self._resources.callback(self._stream.close)
        words = _words(self._line() or b"", _MAGIC)
        if words is None:
            raise InputError(f"standard input holds no yuv4mpegpipe video: {HOW}")
        self.width, self.height = _number(words, "W"), _number(words, "H")
        require_readable(self.width, self.height)
        self.frame_rate = _ratio(words.get("F", "0:0")) or _USUAL_RATE
        self.time_base = 1 / self.frame_rate
        self.sample_aspect_ratio = _ratio(words.get("A", "0:0")) or Fraction(1)
        self.frame_count = None
        self.pixel_format = _pixel_format(words.get("C", "420"))
        form = av.VideoFormat(self.pixel_format, self.width, self.height)
        self.is_deep = form.components[0].bits > 8
        self._range = ColorRange.JPEG if words.get("XCOLORRANGE") == "FULL" else ColorRange.MPEG
        if words.get("I", "p") not in ("p", "?"):
            self.notices.append(
                "standard input is interlaced; its frames are taken as they are: add -vf bwdif to the ffmpeg that "
                "writes it"
            )
        self._decoder = _raw_video("r", self.pixel_format, self.width, self.height)
        self._bytes = sum(each.width * each.height for each in form.components) * (2 if self.is_deep else 1)

    def _frames(self) -> Generator[Frame, None, None]:
        number = 0
        while (line := self._line()) is not None:
            if _words(line, b"FRAME") is None:
                what = "another video" if line.startswith(_MAGIC) else "something else"
                raise IncompleteOutput(
                    f"frame {number} of standard input is followed by {what}, expected a frame of the same video: the "
                    f"{number} so far are done, give one video of one size"
                )
            yield Frame(self._image(number + 1), pts=number, time_base=self.time_base, duration=1)
            number += 1

    def _image(self, number: int) -> np.ndarray:
        """The picture of the frame whose line has been read."""
        data = bytearray()
        while len(data) < self._bytes and (more := self._stream.read(self._bytes - len(data))):
            data += more
        if len(data) < self._bytes:
            raise IncompleteOutput(
                f"standard input ends in the middle of frame {number} ({len(data)} of {self._bytes} bytes): "
                f"the {number - 1} before it are done"
            )
        (frame,) = self._decoder.decode(av.Packet(bytes(data)))
        frame.color_range = self._range
        return np.ascontiguousarray(to_rgb(frame, self.is_deep))

    def _line(self) -> bytes | None:
        """The next line, without its end; None at the end of the stream."""
        line = bytearray()
        while len(line) < _LONGEST_LINE and (byte := self._stream.read(1)):
            if byte == b"\n":
                return bytes(line)
            line += byte
        return bytes(line) or None


class PipeWriter:
    """Frames into a pipe, each of them gone when `write` returns.

    Takes what `media.Writer` takes. 4:2:0, with the depth of the source; like a source that comes from a pipe, if it
    did. BrokenPipeError when the reader at the other end has gone, ResourceError for other errors.

    Args:
        stream: None is standard output.
        aspect: width over height of one pixel; None is the source's.
    """

    takes_alpha = False

    def __init__(
        self,
        source: Reader,
        height: int,
        width: int,
        stream: BinaryIO | None = None,
        aspect: Fraction | None = None,
    ) -> None:
        self._stream = standard_output() if stream is None else stream
        self.is_deep = source.is_deep
        self.notices: list[str] = []
        self.failures: list[str] = []
        self._pixel_format = "yuv420p10le" if source.is_deep else "yuv420p"
        pixel_format = source.pixel_format or ""
        if pixel_format in PIXEL_FORMATS.values() and pixel_format.startswith(("yuv420p", "yuv422p", "yuv444p")):
            self._pixel_format = pixel_format
        self._matrix = matrix_for(height)
        self._encoder = _raw_video("w", self._pixel_format, width, height)
        names = PIXEL_FORMATS | {"420": "", "420jpeg": "", "420paldv": ""}  # swscale's chroma sits as MPEG-2's does
        name = next(name for name, form in names.items() if form == self._pixel_format)
        rate, aspect = source.frame_rate, aspect or source.sample_aspect_ratio
        self._header = (
            f"YUV4MPEG2 W{width} H{height} F{rate.numerator}:{rate.denominator} Ip "
            f"A{aspect.numerator}:{aspect.denominator} C{name} XCOLORRANGE=LIMITED\n"
        ).encode()
        if source.has_audio:
            self.notices.append(f"a pipe of this kind holds no sound, so that of {source.path} is left out")
        if source.has_alpha:
            self.notices.append(f"a pipe of this kind holds no transparency, so that of {source.path} is dropped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass  # nothing is held back

    def write(self, image: np.ndarray, frame: Frame) -> None:
        """Send (height, width, 3) RGB, uint8, or uint16 where `is_deep`; the rate is constant, so times are lost."""
        picture = to_frame(image, self._pixel_format, self._matrix)
        picture.pts = None
        data = b"".join(bytes(packet) for packet in self._encoder.encode(picture))
        left = memoryview(self._header + b"FRAME\n" + data)
        try:
            while left:  # an unbuffered stdout, as of `python -u`, may take a part
                left = left[self._stream.write(left) :]
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ResourceError(
                f"standard output could not be written ({error.strerror}): write to another place"
            ) from error
        self._header = b""


def _raw_video(mode: Literal["r", "w"], pixel_format: str, width: int, height: int) -> av.VideoCodecContext:
    context = av.CodecContext.create("rawvideo", mode)
    context.width, context.height, context.pix_fmt = width, height, pixel_format
    if mode == "w":
        context.time_base = Fraction(1)
    return context


def _words(line: bytes, first: bytes) -> dict[str, str] | None:
    """What a line says after its first word: single letters with their values, X's by name. None for another line."""
    begin, *words = line.split(b" ")
    if begin != first:
        return None
    found = {}
    for word in filter(None, (word.decode("ascii", "replace") for word in words)):
        name, value = word.split("=", 1) if word.startswith("X") and "=" in word else (word[0], word[1:])
        found[name] = value
    return found


def _number(words: dict[str, str], name: str) -> int:
    text = words.get(name, "")
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"the header of standard input gives {name}{text or ' not at all'}, expected a size: {HOW}")
    return int(text)


def _ratio(text: str) -> Fraction | None:
    """ "30000:1001"; None for 0:0, which means unknown, and for anything else."""
    top, _, bottom = text.partition(":")
    known = top.isdecimal() and bottom.isdecimal() and 0 < int(top) < _LARGEST and 0 < int(bottom) < _LARGEST
    return Fraction(int(top), int(bottom)) if known else None


def _pixel_format(name: str) -> str:
    if name not in PIXEL_FORMATS:
        raise InputError(
            f"standard input has the pixel format {name}, which is not read: add -pix_fmt yuv420p to the ffmpeg that "
            "writes it"
        )
    return PIXEL_FORMATS[name]
