"""Encodes the picture of a video into a file of its own."""

import os
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags

from stablevsr.errors import UserError
from stablevsr.media.codecs import Codec
from stablevsr.media.colour import Colours, to_frame
from stablevsr.media.joining import PacketTimes, muxer_options

_X265_SAFE_WIDTH = 64  # its SIMD code overruns the buffers of narrower pictures


@dataclass(frozen=True)
class PictureFormat:
    """How frames are encoded.

    form: FFmpeg's name of the container.
    options: of the encoder.
    rate: average frames per second.
    time_base: seconds per unit of all times.
    aspect: width over height of one pixel.
    """

    form: str
    codec: Codec
    options: dict[str, str]
    height: int
    width: int
    rate: Fraction
    time_base: Fraction
    aspect: Fraction
    colours: Colours


def _options(how: PictureFormat) -> dict[str, str]:
    if how.codec.encoder == "libx264" and _has_avx512():
        # The AVX-512 code of its lookahead reads uninitialized memory: the same frames gave other bits in every other
        # run. AVX2 code gives those that are right.
        return {**how.options, "x264-params": "asm=AVX2,FMA3,BMI2"}
    if how.codec.encoder != "libx265":
        return how.options
    params = [how.options["x265-params"], *(how.colours.mastering.x265_params() if how.colours.mastering else ())]
    if how.width < _X265_SAFE_WIDTH:
        params.append("asm=0")
    return {**how.options, "x265-params": ":".join(params)}


@cache
def _has_avx512() -> bool:
    """Whether this processor is known to have it, which Linux tells."""
    try:
        return "avx512" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


class PictureFile:
    """A video without sound being written; `times` holds the exact times of its packets.

    Raises UserError if the encoder is missing, av.FFmpegError for what encoder or container refuse.
    """

    def __init__(self, path: Path, how: PictureFormat) -> None:
        self._how, self._count = how, 0
        self.times: list[PacketTimes] = []
        if how.codec.encoder not in av.codecs_available:
            raise UserError(
                f"{path} needs the encoder {how.codec.encoder}, which this PyAV lacks; install PyAV from PyPI."
            )
        self._container = av.open(str(path), "w", format=how.form, container_options=muxer_options(how.form))
        try:
            self._stream = self._add_stream()
            self._container.start_encoding()  # makes the encoder fail now if it cannot do this
        except BaseException:
            self.close()
            raise

    def _add_stream(self) -> av.VideoStream:
        how = self._how
        os.environ.setdefault("SVT_LOG", "1")  # errors only; SVT-AV1 bypasses FFmpeg's log
        stream = self._container.add_stream(
            how.codec.encoder,
            rate=how.rate,
            options=_options(how),
            height=how.height,
            width=how.width,
            time_base=how.time_base,
        )
        assert isinstance(stream, av.VideoStream)
        context = stream.codec_context
        context.pix_fmt = how.codec.pix_fmt
        context.sample_aspect_ratio = how.aspect
        context.flags |= Flags.frame_duration  # else the last frame of a variable rate loses its duration
        if how.form == "avi":
            context.max_b_frames = 0  # AVI has no decoding order
        if how.codec.encoder == "libx265" and how.form in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # Apple's players do not show the default, hev1
        how.colours.label(context)
        return stream

    def write(self, image: np.ndarray, tick: int, duration: int) -> None:
        """Append (height, width, 3) RGB, shown at `tick` for `duration` units of the time base."""
        picture = to_frame(image, self._how.codec.pix_fmt, self._how.colours.matrix)
        self._how.colours.label_frame(picture)
        picture.time_base, picture.pts, picture.duration = self._how.time_base, tick, duration
        self._mux(picture)
        self._count += 1

    def finish(self) -> None:
        """Flush the encoder and complete the file."""
        self._mux(None)
        self._container.close()

    def close(self) -> None:
        """Close the file, which may be incomplete."""
        with suppress(av.FFmpegError):  # raised when the trailer of a discarded file cannot be written
            self._container.close()

    def _mux(self, picture: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(picture):
            if picture is None and self._count < 3:
                # x265 derives its decoding delay from the third frame; with fewer, its decoding times are
                # uninitialized memory. No encoder reorders so short a clip.
                packet.dts = packet.pts
            assert packet.pts is not None
            assert packet.dts is not None
            self.times.append(PacketTimes(packet.pts, packet.dts, packet.duration or 0, packet.time_base))
            self._container.mux_one(packet)
