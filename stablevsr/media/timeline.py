"""One clock for files whose own starts anywhere, and starts again where recordings were joined."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from av.format import Flags

from stablevsr.errors import UserError
from stablevsr.media.demuxing import open_input, picture_streams

BACK = Fraction(1, 5)  # seconds; times of decoding never run back, so this is another recording
AHEAD = 10  # seconds; FFmpeg's program takes a longer hole for another recording as well


@dataclass
class _Span:
    """The times of one stream in one recording, in seconds."""

    start: Fraction
    end: Fraction


class _Jumps:
    """Follows the times of one stream and finds where they jump."""

    def __init__(self) -> None:
        self._expected: Fraction | None = None

    def of(self, packet: av.Packet) -> str:
        """ "back", "ahead" or "" for the next packet of the stream."""
        time = packet.dts if packet.dts is not None else packet.pts
        if time is None:
            return ""
        time *= packet.time_base
        expected, self._expected = self._expected, time + (packet.duration or 0) * packet.time_base
        if expected is None or expected - BACK <= time <= expected + AHEAD:
            return ""
        return "back" if time < expected else "ahead"


@dataclass
class _Found:
    """What a stream is made of: its spans, and the jump that began each of them but the first."""

    spans: list[_Span] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, packet: av.Packet, kind: str, default_duration: Fraction) -> None:
        time = packet.pts if packet.pts is not None else packet.dts
        start = time * packet.time_base
        end = start + (packet.duration * packet.time_base if packet.duration else default_duration)
        if kind or not self.spans:
            self.kinds += [kind] if self.spans else []
            self.spans.append(_Span(start, end))
        span = self.spans[-1]
        span.start, span.end = min(span.start, start), max(span.end, end)

    def without_holes(self) -> "_Found":
        """With only those jumps that run back; the others are holes in one recording."""
        joined = _Found(self.spans[:1])
        for span, kind in zip(self.spans[1:], self.kinds, strict=True):
            if kind == "back":
                joined.spans.append(span)
                joined.kinds.append(kind)
            else:
                joined.spans[-1] = _Span(joined.spans[-1].start, max(joined.spans[-1].end, span.end))
        return joined


class Timeline:
    """What to add to the times of a file so that they begin at 0 and run on over every seam.

    Only MPEG streams and their like are looked at, each packet once; other containers are taken as they are, unless
    they begin very late. Every recording keeps its own distance between picture and sound, and its first frame follows
    the last one before it. Raises UserError where the times of the sound jump and those of the picture do not.
    """

    def __init__(self, path: Path) -> None:
        self._offsets: list[Fraction] = [Fraction(0)]
        self._kinds = ("back", "ahead")
        with open_input(path) as container:
            if container.format.flags & Flags.ts_discont.value:
                self._scan(container, path)
            else:
                starts = [s.start_time * s.time_base for s in container.streams if s.start_time is not None]
                # A short wait is meant; an hour is what a cut from a longer recording has kept.
                if starts and min(starts) > AHEAD:
                    self._offsets = [-min(starts)]

    @property
    def seams(self) -> int:
        """How many times the clock starts again."""
        return len(self._offsets) - 1

    @property
    def start(self) -> Fraction:
        """What is added to the times before the first seam, in seconds."""
        return self._offsets[0]

    def clock(self) -> "StreamClock":
        """For one pass over one stream of sound or pictures."""
        return StreamClock(self._offsets, self._kinds)

    def _scan(self, container: av.container.InputContainer, path: Path) -> None:
        picture = picture_streams(container, path)[0]
        sounds = [stream for stream in container.streams.audio if stream.codec_context is not None]
        found = _found(container, [picture, *sounds])
        shown = found.pop(picture.index)
        if not shown.spans:
            return
        if any(other.kinds != shown.kinds for other in found.values()):
            shown, found = shown.without_holes(), {i: other.without_holes() for i, other in found.items()}
            self._kinds = ("back",)
        if any(other.kinds != shown.kinds for other in found.values()):
            raise UserError(
                f"{path} is joined from several recordings, and the times of its sound start again elsewhere than "
                "those of its picture; join them with ffmpeg's concat first."
            )
        first = min(
            span.start for spans in [shown.spans, *(other.spans for other in found.values())] for span in spans[:1]
        )
        self._offsets = [-first]
        for before, after in zip(shown.spans, shown.spans[1:], strict=False):
            self._offsets.append(before.end + self._offsets[-1] - after.start)


def _found(container: av.container.InputContainer, streams: Iterable[av.stream.Stream]) -> dict[int, _Found]:
    found = {stream.index: _Found() for stream in streams}
    jumps = {index: _Jumps() for index in found}
    rates = {s.index: getattr(s, "average_rate", None) for s in streams}
    try:
        for packet in container.demux(*streams):
            if packet.size and (packet.pts is not None or packet.dts is not None):
                index = packet.stream_index
                default = 1 / rates[index] if rates[index] else Fraction(0)
                found[index].add(packet, jumps[index].of(packet), default)
    except av.FFmpegError:
        pass  # a damaged end; reading the frames will tell
    return {index: spans for index, spans in found.items() if spans.spans or index == next(iter(streams)).index}


class StreamClock:
    """Moves the packets of one stream, given in the order of the file."""

    def __init__(self, offsets: list[Fraction], kinds: Iterable[str]) -> None:
        self._offsets, self._kinds = offsets, kinds
        self._jumps, self._part = _Jumps(), 0

    def move(self, packet: av.Packet) -> None:
        """Add to the packet's times what its recording needs."""
        if len(self._offsets) > 1 and self._jumps.of(packet) in self._kinds:
            self._part = min(self._part + 1, len(self._offsets) - 1)
        offset = self._offsets[self._part]
        if offset:
            ticks = round(offset / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks
