"""The picture of a video, encoded into a file of its own, or into several that a crash leaves whole."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags

from stablevsr.atomic import replacing, sync
from stablevsr.errors import ResourceError
from stablevsr.media.codecs import Codec, x264_params
from stablevsr.media.colour import Colours, to_frame
from stablevsr.media.demuxing import exact
from stablevsr.media.joining import PacketTimes, concatenate, muxer_options

SEGMENT = 100  # frames

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
    if how.codec.encoder == "libx264":
        return how.options | x264_params()
    if how.codec.encoder != "libx265":
        return how.options
    params = [how.options["x265-params"], *(how.colours.mastering.x265_params() if how.colours.mastering else ())]
    if how.width < _X265_SAFE_WIDTH:
        params.append("asm=0")
    return {**how.options, "x265-params": ":".join(params)}


class PictureFile:
    """A video without sound being written; `count` is its frames, `times` holds the exact times of its packets.

    Raises ResourceError if the encoder is missing, av.FFmpegError for what encoder or container refuse.
    """

    def __init__(self, path: Path, how: PictureFormat) -> None:
        self._how, self.count = how, 0
        self.times: list[PacketTimes] = []
        if how.codec.encoder not in av.codecs_available:
            raise ResourceError(
                f"{path} needs the encoder {how.codec.encoder}, which this PyAV lacks; install PyAV from PyPI"
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
        self.count += 1

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
            if picture is None and self.count < 3:
                # x265 derives its decoding delay from the third frame; with fewer, its decoding times are
                # uninitialized memory. No encoder reorders so short a clip.
                packet.dts = packet.pts
            assert packet.pts is not None
            assert packet.dts is not None
            self.times.append(PacketTimes(packet.pts, packet.dts, packet.duration or 0, exact(packet.time_base)))
            self._container.mux_one(packet)


class SegmentedPicture:
    """As `PictureFile`, but in segments of `SEGMENT` frames that outlive the process, each with an encoder of its own.

    Those that a killed process has finished are taken up, so that its run can be continued; `count` is how many frames
    they hold. What it left unfinished is written anew.

    Args:
        folder: where the segments are, and stay.
        target: where `finish` puts them together.
    """

    def __init__(self, folder: Path, target: Path, how: PictureFormat) -> None:
        self._folder, self._target, self._how = folder, target, how
        self.count, self.last_tick = 0, None
        self.times: list[PacketTimes] = []  # once finished
        self._begun: PictureFile | None = None
        folder.mkdir(exist_ok=True)
        self._finished = 0
        while (record := self._record(self._finished)).exists():
            found = json.loads(record.read_text())
            self.count, self.last_tick = self.count + found["frames"], found["last_tick"]
            self._finished += 1

    def write(self, image: np.ndarray, tick: int, duration: int) -> None:
        """As `PictureFile.write`."""
        if self._begun is None:
            self._begun = PictureFile(self._path(self._finished), self._how)
        self._begun.write(image, tick, duration)
        self.count, self.last_tick = self.count + 1, tick
        if self._begun.count == SEGMENT:
            self._end()

    def finish(self) -> None:
        """Put everything together in the target; the segments stay."""
        self._end()
        pieces = [(self._path(i), self._times(i)) for i in range(self._finished)]
        self.times = concatenate(pieces, self._target, self._how.form)

    def close(self) -> None:
        """Let go of a segment that is not finished."""
        if self._begun is not None:
            self._begun.close()

    def _end(self) -> None:
        done, self._begun = self._begun, None
        if done is None:
            return
        done.finish()
        sync(self._path(self._finished))
        times = [[*astuple(each)[:3], str(each.time_base)] for each in done.times]
        record = {"frames": done.count, "last_tick": self.last_tick, "times": times}
        with replacing(self._record(self._finished)) as part:  # only from here on it counts
            part.write_text(json.dumps(record))
        self._finished += 1

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}"

    def _record(self, index: int) -> Path:
        return self._folder / f"{index:06d}.json"

    def _times(self, index: int) -> Iterator[PacketTimes]:
        for shown, decoded, duration, base in json.loads(self._record(index).read_text())["times"]:
            yield PacketTimes(shown, decoded, duration, Fraction(base))
