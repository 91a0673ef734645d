"""Opens files with FFmpeg and chooses the video stream to read."""

from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
from av.format import Flags
from av.stream import Disposition

from stablevsr.errors import InputError

HELP = "give a video file, an image or a folder of images"
# Cover art and seek-bar previews, never what the user wants to see.
_NOT_A_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Old files have tags that are not UTF-8. PyAV 19 keeps their bytes; older versions raise unless told otherwise.
_TAG_OPTIONS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
# Finds sound that starts late, as in joined recordings: probes more than FFmpeg's default of 5 MB and a few seconds
# (in bytes and microseconds), and reads every table of a TS file.
_LONG_PROBE = {"probesize": "100000000", "analyzeduration": "600000000", "scan_all_pmts": "1"}


def open_input(path: Path) -> av.container.InputContainer:
    """Open a file for reading. Raises InputError if FFmpeg cannot make sense of it."""
    try:
        container = _opened(path, {})
        if any(stream.codec_context and not stream.codec_context.sample_rate for stream in container.streams.audio):
            container.close()
            container = _opened(path, _LONG_PROBE)
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be opened as a video ({error.strerror}); {HELP}") from error
    return container


def _opened(path: Path, options: dict[str, str]) -> av.container.InputContainer:
    # Absolute, because FFmpeg would read "a:b.mp4" as a URL.
    return av.open(str(path.absolute()), "r", container_options=options, **_TAG_OPTIONS)


def is_cover(stream: av.stream.Stream) -> bool:
    """Whether a stream is cover art, or another picture that is not part of the video."""
    return stream.type == "video" and bool(stream.disposition & _NOT_A_PICTURE)


def picture_streams(container: av.container.InputContainer, path: Path) -> list[av.VideoStream]:
    """All real video streams, the one to read first: the default stream, or the largest if several or none are.

    Raises InputError if there is none, or none that FFmpeg can decode.
    """
    streams = [stream for stream in container.streams.video if not is_cover(stream)]
    if not streams:
        raise InputError(f"{path} has no video stream; {HELP}")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise InputError(f"{path} is in a video codec that cannot be decoded; convert it to H.264 first")

    def rank(stream: av.VideoStream) -> tuple[bool, int]:
        return bool(stream.disposition & Disposition.default), stream.width * stream.height

    return sorted(known, key=rank, reverse=True)


def has_flag(container: av.container.Container, flag: Flags) -> bool:
    """Whether the container format has this flag."""
    return bool(container.format.flags & flag.value)  # type: ignore[operator]  # PyAV's stubs: a flag's value is a flag


class Ratio(Protocol):
    """What PyAV gives for a ratio: a Fraction, and from release 19 on an AVRational."""

    @property
    def numerator(self) -> int: ...
    @property
    def denominator(self) -> int: ...


def exact(ratio: Ratio) -> Fraction:
    """A ratio as a Fraction: two AVRationals multiply to one of 32 bits, rounded."""
    return Fraction(ratio.numerator, ratio.denominator)


def decoded_at(packet: av.Packet) -> Fraction:
    """Decoding time in seconds of a packet that has one."""
    assert packet.dts is not None
    return packet.dts * packet.time_base


def base_of(stream: av.stream.Stream) -> Fraction:
    """The time base of a stream: seconds per unit of its times."""
    assert stream.time_base is not None  # set for every stream of a container
    return exact(stream.time_base)


def codec_name(stream: av.stream.Stream) -> str:
    """FFmpeg's name of a stream's codec, or "unknown"."""
    return getattr(stream, "name", None) or "unknown"
