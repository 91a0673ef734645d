"""Reads a video file as a clip, one decoded frame at a time."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.container import Flags
from av.sidedata.sidedata import Type as SideData
from av.video.frame import PictureType

from stablevsr.errors import InputError, UserError
from stablevsr.media.colour import (
    HDR_TRANSFERS,
    Colours,
    bits,
    frame_data,
    has_dynamic_metadata,
    is_transparent,
    to_rgb,
)
from stablevsr.media.demuxing import HELP, base_of, codec_name, exact, open_input, picture_streams
from stablevsr.media.display import Orientation, deinterlaced
from stablevsr.media.frame import Frame, Reader
from stablevsr.media.seeking import Entry, can_seek, entry_to
from stablevsr.media.still_reader import MAX_PIXELS
from stablevsr.media.timeline import Timeline
from stablevsr.media.truncation import damaged_at, missing_bytes

_UNKNOWN_RATE, _HIGHEST_RATE = Fraction(25), 1000  # frames a second
_INSPECTED = 32  # packets that reveal wrong times
_LEAD = 2000  # packets searched for the first key frame


class VideoReader(Reader):
    """The picture of a video (the stream chosen by `demuxing.picture_streams`): upright, deinterlaced, in RGB.

    Times start at 0 and continue where the clock of MPEG streams restarts (`timeline`). Frames before the first key
    frame cannot be decoded and are dropped with a notice.

    Opening decodes the first frame to learn the size; every pass opens the file again. Raises UserError if the file is
    not a video, a frame cannot be decoded, or the size changes midway.
    """

    def __init__(self, path: Path, allow_truncated: bool = False, allow_hdr: bool = False) -> None:
        super().__init__(path)
        self._check_whole(allow_truncated)
        self._skipped = 0  # packets before the first key frame
        with self._open() as (container, stream):
            self._tell_others(container)
            self._skipped = _packets_before_key_frame(container, stream)
        if self._skipped:
            self.notices.append(
                f"{path} begins inside a group of pictures; what comes before its first key frame cannot be decoded "
                "and is left out"
            )
        self.timeline = Timeline(path)
        if self.timeline.seams:
            self.notices.append(
                f"{path} is joined from {self.timeline.seams + 1} recordings, which are laid end to end"
            )
        with self._open() as (container, stream):
            self._shown_as_decoded = self._has_wrong_times(container, stream)
        with self._open() as (container, stream):
            first = next(self._decode(self._packets(container, stream)), None)
            if first is None:
                raise InputError(f"{path} has a video stream without a single frame; {HELP}")
            if first.color_trc in HDR_TRANSFERS and not allow_hdr:
                raise InputError(
                    f"{path} is HDR video ({HDR_TRANSFERS[int(first.color_trc)]}), for which the model is not made; "
                    "convert it to BT.709 first, or pass --allow-hdr"
                )
            self.frame_rate = _frame_rate(stream)
            self.time_base = base_of(stream)
            self.sample_aspect_ratio = exact(stream.sample_aspect_ratio or Fraction(1))
            self.frame_count = max(0, stream.frames - self._skipped) or None
            self.has_audio = bool(container.streams.audio)
            self.is_deep = bits(first) > 8
            self.colours = Colours.of(first)
            if first.color_trc in HDR_TRANSFERS:
                self.notices.append(
                    f"{path}: HDR is read as if it were not; its colours stay right in a video, which is labelled "
                    f"{HDR_TRANSFERS[int(first.color_trc)]} again, but look flat anywhere else"
                )
            if has_dynamic_metadata(first):
                self.notices.append(f"{path}: dynamic HDR metadata (HDR10+, Dolby Vision) is dropped")
            if first.interlaced_frame:
                self.notices.append(f"{path} is interlaced; each of its frames becomes one whole picture (bwdif)")
            # VP9 keeps alpha beside the picture, where FFmpeg's decoder does not look.
            if stream.metadata.get("alpha_mode") == "1" or is_transparent(first):
                self.notices.append(f"{path}: the transparency of a video is dropped")
        self.height, self.width = _upright_size(first)
        if _orientation(first).transpose:
            self.sample_aspect_ratio = 1 / self.sample_aspect_ratio

    def frame_times(self) -> Iterator[Fraction] | None:
        """Presentation times in seconds, from the packets alone; None if one has none."""
        with self._open() as (container, stream):
            try:
                times = [
                    packet.pts for packet in self._packets(container, stream) if packet.size and not packet.is_discard
                ]
            except av.FFmpegError:
                return None  # damaged; reading the frames reports it
            base = base_of(stream)
        known = [time for time in times if time is not None]
        return iter([time * base for time in sorted(known)]) if len(known) == len(times) else None

    def _has_wrong_times(self, container: av.container.InputContainer, stream: av.VideoStream) -> bool:
        """Whether frames are reordered, yet the file stores their decoding times as presentation times."""
        packets = [packet for packet in islice(self._packets(container, stream), _INSPECTED) if packet.size]
        if not stream.codec_context.has_b_frames or any(packet.pts != packet.dts for packet in packets):
            return False
        try:
            times = [frame.pts for packet in packets for frame in packet.decode()]
        except av.FFmpegError:
            return False  # decoding from the start reports it
        known = [time for time in times if time is not None]
        return len(known) == len(times) and known != sorted(known)

    def _tell_others(self, container: av.container.InputContainer) -> None:
        chosen, *others = picture_streams(container, self.path)
        if others:
            names = ", ".join(f"stream {s.index} ({codec_name(s)}, {s.width}x{s.height})" for s in others)
            self.notices.append(
                f"{self.path} holds several videos; stream {chosen.index} ({chosen.width}x{chosen.height}) is read, "
                f"not {names}"
            )

    def _check_whole(self, allow_truncated: bool) -> None:
        missing = missing_bytes(self.path)
        if missing and not allow_truncated:
            raise InputError(
                f"{self.path} is cut short: {missing} bytes are missing at its end; "
                "get the whole file, or pass --allow-truncated for what is there"
            )
        if missing:
            self.notices.append(f"{self.path} is cut short, {missing} bytes are missing at its end")
            return
        position = damaged_at(self.path)
        if position is not None and not allow_truncated:
            raise InputError(
                f"{self.path} is damaged at byte {position}, so frames or sound are lost there; "
                "repair it first, or pass --allow-truncated for the rest"
            )
        if position is not None:
            self.notices.append(f"{self.path} is damaged at byte {position}, so frames or sound are lost there")

    def _frames(self) -> Generator[Frame, None, None]:
        with self._open() as (container, stream):
            start = (stream.start_time or 0) + round(self.timeline.start / base_of(stream))
            step = max(1, round(1 / (self.frame_rate * self.time_base)))
            clock = _Clock(start, step, self._shown_as_decoded)
            frames = self._of_one_size(self._decode(self._packets(container, stream)))
            for number, decoded in enumerate(deinterlaced(frames, stream, self.path), 1):
                image = self._convert(decoded, number)
                time = clock.time_of(decoded, number == 1)
                yield Frame(image, pts=time, time_base=self.time_base, duration=decoded.duration or None)

    def _frames_from(self, first: int) -> Generator[Frame, None, None]:
        entry = self._entry_to(first)
        if entry:
            with self._open() as (container, stream):
                frames = self._sought(container, stream, entry)
                if frames:
                    for number, decoded in enumerate(frames, first + 1):
                        image = self._convert(decoded, number)
                        yield Frame(image, pts=decoded.pts, time_base=self.time_base, duration=decoded.duration or None)
                    return
        yield from super()._frames_from(first)

    def _entry_to(self, first: int) -> Entry | None:
        if self._skipped or self._shown_as_decoded:
            return None
        with self._open() as (container, stream):
            if not can_seek(container, stream):
                return None
            try:
                return entry_to(self._packets(container, stream), first)
            except av.FFmpegError:
                return None  # damaged; decoding from the start will tell where

    def _sought(
        self, container: av.container.InputContainer, stream: av.VideoStream, entry: Entry
    ) -> Iterator[av.VideoFrame] | None:
        """The decoded frames from the wanted one on; None if seeking does not lead to a key frame before it."""
        moved = round(self.timeline.start / base_of(stream))
        try:
            container.seek(entry.key - moved, stream=stream)
            packets = self._packets(container, stream)
            begin = next(packets)
            number = None if begin.pts is None else entry.keys.get(begin.pts)
            if number is None:
                return None
            decoded = self._of_one_size(self._decode(chain([begin], packets), number), number)
            key = next(decoded, None)
            # With gradual intra refresh, predicted pictures are marked as key frames as well.
            if key is None or key.pts != begin.pts or key.pict_type != PictureType.I or not key.key_frame:
                return None
            frames = deinterlaced(chain([key], decoded), stream, self.path, number)
            wanted = next((frame for frame in frames if frame.pts is None or frame.pts >= entry.wanted), None)
        except (av.FFmpegError, UserError, StopIteration):
            return None  # decoding from the start reports it
        return chain([wanted], frames) if wanted and wanted.pts == entry.wanted else None

    @contextmanager
    def _open(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        with open_input(self.path) as container:
            # Generated times put the frames of AVI files in the wrong order.
            container.flags &= ~Flags.gen_pts.value  # type: ignore[operator]  # PyAV's stubs: a flag's value is a flag
            if container.format.name == "tty":  # FFmpeg plays any text file as a terminal screen
                raise InputError(f"{self.path} is a text file; {HELP}")
            stream = picture_streams(container, self.path)[0]
            context = stream.codec_context
            if context.width * context.height > MAX_PIXELS:
                raise InputError(
                    f"{self.path} is {context.width}x{context.height}, but at most {MAX_PIXELS} pixels can be read; "
                    "make it smaller first"
                )
            yield container, stream

    def _packets(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
        """Packets from the first key frame on, with continuous times; an empty one at the end flushes the decoder."""
        clock = self.timeline.clock(stream.index)
        for number, packet in enumerate(container.demux(stream)):
            if not packet.size and packet.dts is not None:
                continue  # Theora: the previous frame stays; decoders reject this
            clock.move(packet)
            if number >= self._skipped:
                yield packet

    def _decode(self, packets: Iterator[av.Packet], number: int = 0) -> Iterator[av.VideoFrame]:
        """Decode packets that start with a key frame; the file has `number` frames before it."""
        first_key, begins_inside = None, number or self._skipped
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except av.FFmpegError as error:
                raise self._damaged(number + 1) from error
            if packet is None:
                return
            first_key = packet.pts if first_key is None else first_key
            for frame in frames:
                if begins_inside and frame.pts is not None and first_key is not None and frame.pts < first_key:
                    continue  # depends on frames before the key frame
                number += 1
                if frame.is_corrupt:  # the decoder concealed errors
                    raise self._damaged(number)
                yield frame

    def _of_one_size(self, frames: Iterator[av.VideoFrame], skipped: int = 0) -> Iterator[av.VideoFrame]:
        for number, frame in enumerate(frames, skipped + 1):
            height, width = _upright_size(frame)
            if (height, width) != (self.height, self.width):
                raise InputError(
                    f"frame {number} of {self.path} is {width}x{height}, but the video began at "
                    f"{self.width}x{self.height}; cut it where the size changes"
                )
            yield frame

    def _damaged(self, number: int) -> InputError:
        others = f", or pass --frames 0:{number - 1} for those before it" if number > 1 else ""
        return InputError(
            f"frame {number} of {self.path} cannot be decoded; the file is damaged there, so repair it first{others}"
        )

    def _convert(self, decoded: av.VideoFrame, number: int) -> np.ndarray:
        try:
            image = to_rgb(decoded, self.is_deep)
        except av.FFmpegError as error:
            raise InputError(
                f"frame {number} of {self.path} has colours that cannot be converted to RGB "
                f"({decoded.format.name}, matrix {decoded.colorspace}); convert the video to BT.709 first"
            ) from error
        return np.ascontiguousarray(_orientation(decoded).apply(image))


def _frame_rate(stream: av.VideoStream) -> Fraction:
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    # Higher rates are those of the clock: FFmpeg reports 60000 for DV.
    return exact(next((rate for rate in rates if rate <= _HIGHEST_RATE), rates[0] if rates else _UNKNOWN_RATE))


def _packets_before_key_frame(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Number of packets before the first key frame; 0 if none is marked as one."""
    try:
        for number, packet in enumerate(container.demux(stream)):
            if packet.is_keyframe or number == _LEAD:
                return number % _LEAD
    except av.FFmpegError:
        pass  # damaged; decoding reports where
    return 0


class _Clock:
    """Computes presentation times where the file lacks them: AVI stores decoding times only, raw H.264 none.

    `start` and `step`: time of the first frame and interval between frames, used when nothing better is known;
    `by_decoding`: whether only decoding times can be trusted.
    """

    def __init__(self, start: int, step: int, by_decoding: bool) -> None:
        self._expected, self._step, self._by_decoding = start, step, by_decoding
        self._delay: int | None = None  # of decoding times; None if the file has presentation times

    def time_of(self, frame: av.VideoFrame, first: bool) -> int:
        if first and (frame.pts is None or self._by_decoding) and frame.dts is not None:
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
    matrix = frame_data(frame, SideData.DISPLAYMATRIX)
    return Orientation() if not matrix else Orientation.from_display_matrix(np.frombuffer(matrix, np.int32))
