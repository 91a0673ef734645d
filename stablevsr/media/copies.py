"""Copies sound, subtitles and attachments of a source file into an output beside the finished picture."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol

import av
from av.format import Flags
from av.stream import Discard

from stablevsr.media.demuxing import base_of, decoded_at, has_flag, open_input
from stablevsr.media.sound import SoundTrack
from stablevsr.media.subtitles import TextTrack
from stablevsr.media.tags import describe
from stablevsr.media.timeline import Timeline
from stablevsr.media.tracks import Choice, add_copy

_UNNOTICED = Fraction(1, 40)  # seconds of offset between sound and picture that go unnoticed


class TrackError(Exception):
    """A stream cannot be written to its end; the other streams can do without it."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class _Track(Protocol):
    @property
    def stream(self) -> av.stream.Stream: ...

    @property
    def damaged(self) -> int: ...

    def feed(self, packet: av.Packet) -> list[av.Packet]: ...

    def finish(self) -> list[av.Packet]: ...


class _CopiedTrack:
    """Copies packets unchanged, except for those that an edit list or a trim cut off.

    The last of those is kept if it goes unnoticed, because decoders need it to start. `hides`: whether the container
    can mark what comes before 0 as not to be heard.
    """

    def __init__(self, stream: av.stream.Stream, hides: bool) -> None:
        self.stream, self.damaged, self._hides = stream, 0, hides
        self._start_up: av.Packet | None = None

    def feed(self, packet: av.Packet) -> list[av.Packet]:
        if packet.is_discard:
            self._start_up = packet if self._hides or decoded_at(packet) >= -_UNNOTICED else None
            return []
        start_up, self._start_up = self._start_up, None
        return [start_up, packet] if start_up else [packet]

    def finish(self) -> list[av.Packet]:
        return []


class StreamCopies:
    """Feeds the chosen streams of the file at `source` to `output`, interleaved with its picture.

    The file is opened again, independently of any reader; one packet is held at a time. `until`: seconds of the source
    after which reading stops, for a rehearsal.
    """

    def __init__(
        self,
        source: Path,
        output: av.container.OutputContainer,
        choices: list[Choice],
        timeline: Timeline,
        until: Fraction | None = None,
    ) -> None:
        self._path, self._output, self._until, self._timeline = source, output, until, timeline
        self._input = open_input(source)
        self._tracks: dict[int, _Track] = {}
        self._covers: dict[int, av.stream.Stream] = {}
        self.failures: list[str] = []
        try:
            for choice in choices:
                self._add(choice)
        except BaseException:
            self._input.close()
            raise
        self._clocks = {index: timeline.clock(index) for index in self._tracks}
        self._places = {index: Placer(track.stream, output) for index, track in self._tracks.items()}
        for stream in self._input.streams:
            if stream.index not in self._tracks and stream.index not in self._covers:
                stream.discard = Discard.all  # lets the demuxer skip the video's bytes
        self._packets = self._read()
        self._next: av.Packet | None = None
        self._begun = False

    def copy_until(self, time: Fraction | None) -> None:
        """Write the packets due by `time` seconds, or all the rest for None. Raises TrackError."""
        if not self._begun:  # only now: the first packet makes the output write its header
            self._begun, self._next = True, next(self._packets, None)
        while self._next is not None and (time is None or decoded_at(self._next) <= time):
            index = self._next.stream_index
            self._write(index, partial(self._tracks[index].feed, self._next))
            self._next = next(self._packets, None)
        if time is None:
            for index, track in self._tracks.items():
                self._write(index, track.finish)
                if track.damaged:
                    self.failures.append(
                        f"{self._path}: {track.damaged} packets of stream {index} are damaged and could not be used"
                    )

    def close(self) -> None:
        """Close the source."""
        self._input.close()

    def _add(self, choice: Choice) -> None:
        stream: av.stream.Stream = self._input.streams[choice.index]
        if choice.how == "attach":
            assert choice.attachment
            self._output.add_attachment(*choice.attachment)
            return
        if choice.how == "cover":
            copy = self._covers[stream.index] = self._output.add_stream_from_template(stream, opaque=True)
        else:
            track = self._tracks[stream.index] = self._track(choice, stream)
            copy = track.stream
        describe(copy, stream)

    def _track(self, choice: Choice, stream: av.stream.Stream) -> _Track:
        if choice.how == "sound":
            assert isinstance(stream, av.AudioStream)
            assert choice.sound
            return SoundTrack(stream, self._output, choice.sound, choice.origin)
        if choice.how == "text":
            return TextTrack(stream, self._output, self._output.format.name)
        return _CopiedTrack(add_copy(self._output, stream), self._output.format.name in ("mp4", "mov"))

    def _write(self, index: int, packets: Callable[[], list[av.Packet]]) -> None:
        try:
            for packet in packets():
                if self._places[index].place(packet):
                    self._output.mux_one(packet)
        except (av.FFmpegError, ValueError) as error:
            raise TrackError(index, getattr(error, "strerror", None) or str(error)) from error

    def _read(self) -> Iterator[av.Packet]:
        wanted = [self._input.streams[index] for index in (*self._covers, *self._tracks)]
        packets = self._input.demux(*wanted) if wanted else iter(())
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self.failures.append(
                    f"the audio of {self._path} cannot be read to its end ({error.strerror}); repair the file first"
                )
                return
            if packet is None:
                return
            if not packet.size:  # the demuxer ends with an empty packet per stream
                continue
            if packet.stream_index in self._covers:
                self._write_cover(packet)
                continue
            if not self._clocks[packet.stream_index].move(packet):
                continue
            self._complete(packet)
            if self._until is not None and decoded_at(packet) > self._until:
                return
            yield packet

    def _write_cover(self, packet: av.Packet) -> None:
        cover = self._covers.pop(packet.stream_index, None)
        if cover is not None:
            packet.pts = packet.dts = 0
            packet.stream = cover
            self._output.mux_one(packet)

    def _complete(self, packet: av.Packet) -> None:
        """Fill in a missing decoding time: the presentation time, else the end of the previous packet."""
        if packet.dts is None:
            packet.dts = packet.pts if packet.pts is not None else self._places[packet.stream_index].expected(packet)
        if packet.pts is None:
            packet.pts = packet.dts


class Placer:
    """Places the packets of one stream on an output's clock, with rising decoding times."""

    def __init__(self, stream: av.stream.Stream, output: av.container.OutputContainer) -> None:
        self._stream = stream
        # Containers with coarse times allow several packets at one time.
        self._step = 0 if has_flag(output, Flags.ts_nonstrict) else 1
        self._overlaps = stream.type == "audio"  # subtitles may share a time
        self._last: int | None = None
        self._latest: int | None = None  # in the source
        self._end = Fraction(0)  # of the previous packet, in seconds

    def expected(self, packet: av.Packet) -> int:
        """The time of `packet`, in its own units, if it directly follows the previous one."""
        return round(self._end / packet.time_base)

    def place(self, packet: av.Packet) -> bool:
        """Rescale a packet to the stream's units and make its decoding time rise; False if it has to be dropped.

        Sound is dropped where it goes back in time, as when the sound of one recording outlasts its picture.
        """
        assert packet.pts is not None
        base = base_of(self._stream)
        self._end = decoded_at(packet) + (packet.duration or 0) * packet.time_base
        shown, decoded = round(packet.pts * packet.time_base / base), round(decoded_at(packet) / base)
        if self._latest is not None and self._overlaps and decoded < self._latest:
            return False
        self._latest = decoded
        if self._last is not None:
            decoded = max(decoded, self._last + self._step)
        packet.duration = round((packet.duration or 0) * packet.time_base / base)
        packet.pts, packet.dts, packet.time_base = max(shown, decoded), decoded, base
        packet.stream, self._last = self._stream, decoded
        return True
