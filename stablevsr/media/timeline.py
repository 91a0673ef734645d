"""A continuous clock for files whose own starts anywhere, or restarts where recordings were joined."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
from av.format import Flags

from stablevsr.errors import InputError
from stablevsr.media.demuxing import base_of, has_flag, open_input, picture_streams

SLIP = Fraction(1, 50)  # seconds back; decoding times never decrease, so this may be another recording
BACK = Fraction(1, 5)  # seconds back; this is another recording
AHEAD = 10  # seconds ahead; the ffmpeg program, too, treats a longer gap as another recording
# Which jumps start a recording: the first set on which picture and sound agree.
_READINGS = (("slip", "back", "ahead"), ("back", "ahead"), ("back",))
_SLACK = Fraction(1, 2)  # seconds by which the sound of a recording may start before its picture or end after it


class _Jumps:
    """Finds jumps in the times of one stream."""

    def __init__(self) -> None:
        self._last: Fraction | None = None
        self._expected = Fraction(0)

    def of(self, decoded: Fraction, duration: Fraction) -> str:
        """Classify the step to the next packet, decoded at that second: "slip", "back", "ahead" or ""."""
        last, expected = self._last, self._expected
        self._last, self._expected = decoded, decoded + duration
        if last is None:
            return ""
        if decoded < expected - BACK:
            return "back"
        if decoded > expected + AHEAD:
            return "ahead"
        return "slip" if decoded < last - SLIP else ""


@dataclass
class _Piece:
    """A run of packets of one stream, between jumps in its times or in those of the picture.

    first: index of the first packet in its stream.
    seam: how many jumps of the picture precede it in the file.
    jump: the jump of the stream's own times before the first packet; "" if only those of the picture jumped.
    start, end: presentation time in seconds on the file's clock.
    """

    first: int
    seam: int
    jump: str
    start: Fraction
    end: Fraction

    def joined(self, other: "_Piece") -> "_Piece":
        """Both pieces as one."""
        start, end = min(self.start, other.start), max(self.end, other.end)
        return _Piece(self.first, self.seam, self.jump, start, end)


@dataclass
class _StreamScan:
    """Splits one stream into pieces, packet by packet.

    usual: seconds for packets without a duration, or with one that FFmpeg derived from a gap after them.
    """

    usual: Fraction
    pieces: list[_Piece] = field(default_factory=list)
    _jumps: _Jumps = field(default_factory=_Jumps)
    _count: int = 0

    def add(self, packet: av.Packet, seam: int | None) -> None:
        """Append a packet. `seam`: as in `_Piece`; None for the picture itself, which counts its own."""
        self._count += 1
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            return
        start = time * packet.time_base
        duration = (packet.duration or 0) * packet.time_base
        if 0 < duration <= AHEAD:
            self.usual = duration
        decoded = start if packet.dts is None else packet.dts * packet.time_base
        if start > decoded + AHEAD:  # see `StreamClock`
            start = decoded + self.usual
        jump = self._jumps.of(decoded, self.usual)
        if seam is None:
            seam = len(self.pieces) - (0 if jump or not self.pieces else 1)
        piece = _Piece(self._count - 1, seam, jump, start, start + self.usual)
        if not self.pieces or jump or seam != self.pieces[-1].seam:
            self.pieces.append(piece)
        else:
            self.pieces[-1] = self.pieces[-1].joined(piece)


@dataclass(frozen=True)
class _Recordings:
    """The recordings that a picture consists of, if jumps of the given `kinds` start one.

    spans: start and end of each on the file's clock.
    of_seam: for each jump of the picture, the recording that starts or continues there.
    """

    kinds: tuple[str, ...]
    spans: list[tuple[Fraction, Fraction]]
    of_seam: list[int]

    @classmethod
    def of(cls, picture: list[_Piece], kinds: tuple[str, ...]) -> "_Recordings":
        spans: list[tuple[Fraction, Fraction]] = []
        of_seam = []
        for piece in picture:
            if not spans or piece.jump in kinds:
                spans.append((piece.start, piece.end))
            else:
                spans[-1] = min(spans[-1][0], piece.start), max(spans[-1][1], piece.end)
            of_seam.append(len(spans) - 1)
        return cls(kinds, spans, of_seam)

    def switches(self, pieces: list[_Piece]) -> list[tuple[int, int]] | None:
        """Return (packet index, recording that starts there) for a sound stream; None if they do not match."""
        runs = list(self._runs(pieces))
        homes = [self._homes(run) for run in runs]
        next_homes = [own[0] for own in homes[1:]] + [len(self.spans)]
        found: list[tuple[int, int]] = []
        for run, own, following in zip(runs, homes, next_homes, strict=True):
            # After a jump that the picture does not have, the place of the sound is unknown.
            jumps_alone = following <= own[-1] or own != sorted(own)
            goes_on_alone = following > own[-1] + 1 and not self._ends_in_time(run[-1], own[-1])
            if jumps_alone or goes_on_alone or not (len(run) == 1 or all(map(self._fits, run, own))):
                return None
            for piece, home in zip(run, own, strict=True):
                if not found or home != found[-1][1]:
                    found.append((piece.first, home))
        return found

    def _ends_in_time(self, piece: _Piece, recording: int) -> bool:
        return piece.end <= self.spans[recording][1] + _SLACK

    def _runs(self, pieces: list[_Piece]) -> Iterator[list[_Piece]]:
        """Group pieces between the stream's own jumps; those in one recording are joined."""
        number = 0
        numbers = [number := number + (piece.jump in self.kinds) for piece in pieces]
        for _, numbered in groupby(zip(numbers, pieces, strict=True), lambda pair: pair[0]):
            run: list[_Piece] = []
            for _, piece in numbered:
                if run and self.of_seam[piece.seam] == self.of_seam[run[-1].seam]:
                    run[-1] = run[-1].joined(piece)
                else:
                    run.append(piece)
            yield run

    def _homes(self, run: list[_Piece]) -> list[int]:
        """Return the recording of each piece of a run.

        A run inside one recording belongs to it. If it crosses a seam, either sound and picture were not interleaved
        exactly, and a short end reaches past the seam; or the sound restarted where its times happen to continue.
        """
        where = [self.of_seam[piece.seam] for piece in run]
        longest = max(range(len(run)), key=lambda i: run[i].end - run[i].start)
        main = where[longest]
        return [main if self._fits(piece, main) else home for piece, home in zip(run, where, strict=True)]

    def _fits(self, piece: _Piece, recording: int) -> bool:
        return self.spans[recording][0] - _SLACK <= piece.start and self._ends_in_time(piece, recording)


class Timeline:
    """Offsets for the times of a file so that they start at 0 and continue across every seam.

    Only containers whose clock may jump (MPEG streams) are scanned, once through all packets; others are left alone
    unless they start very late. Every recording keeps its offset between picture and sound, and its first frame
    follows the last frame of the one before. Raises InputError if the times of the sound jump where those of the
    picture do not.
    """

    def __init__(self, path: Path) -> None:
        self._offsets = [Fraction(0)]
        self._ends: list[Fraction] = []  # of each recording but the last, on the new clock
        self._switches: dict[int, list[tuple[int, int]]] = {}  # by index of the stream
        with open_input(path) as container:
            if has_flag(container, Flags.ts_discont):
                self._scan(container, path)
            else:
                starts = [s.start_time * base_of(s) for s in container.streams if s.start_time is not None]
                # A short delay is intended; an hour is left over from cutting a longer recording.
                if starts and min(starts) > AHEAD:
                    self._offsets = [-min(starts)]

    @property
    def seams(self) -> int:
        """Number of times the clock restarts."""
        return len(self._offsets) - 1

    @property
    def start(self) -> Fraction:
        """Seconds added to the times before the first seam."""
        return self._offsets[0]

    def clock(self, index: int) -> "StreamClock":
        """A clock for one pass over the stream with that index."""
        return StreamClock(self._offsets, self._ends, self._switches.get(index, []))

    def _scan(self, container: av.container.InputContainer, path: Path) -> None:
        picture = picture_streams(container, path)[0]
        sounds = [stream for stream in container.streams.audio if stream.codec_context is not None]
        scans = _scanned(container, picture, sounds)
        shown = scans.pop(picture.index)
        if not shown:
            return
        for kinds in _READINGS:
            recordings = _Recordings.of(shown, kinds)
            found = {index: recordings.switches(pieces) for index, pieces in scans.items()}
            switches = {index: places for index, places in found.items() if places}
            if len(switches) == len(found):
                break
        else:
            raise InputError(
                f"{path} is joined from several recordings, and the times of its sound restart elsewhere than "
                "those of its picture; join them with ffmpeg's concat first"
            )
        starts = [(piece.first, recordings.of_seam[piece.seam]) for piece in shown]
        self._switches = {**switches, picture.index: starts}
        first = [recordings.spans[0][0]]
        for pieces, places in ((scans[index], places) for index, places in switches.items()):
            later = places[1][0] if len(places) > 1 else None
            if places[0][1] == 0:
                first += [piece.start for piece in pieces if later is None or piece.first < later]
        self._offsets = [-min(first)]
        for before, after in zip(recordings.spans, recordings.spans[1:], strict=False):
            self._ends.append(before[1] + self._offsets[-1])
            self._offsets.append(self._ends[-1] - after[0])


def _scanned(
    container: av.container.InputContainer, picture: av.VideoStream, sounds: list[av.AudioStream]
) -> dict[int, list[_Piece]]:
    """Return the pieces of each stream, the picture first, without sound streams that have no packets."""
    scans = {picture.index: _StreamScan(1 / picture.average_rate if picture.average_rate else Fraction(0))}
    scans |= {stream.index: _StreamScan(Fraction(0)) for stream in sounds}
    shown = scans[picture.index]
    try:
        for packet in container.demux(picture, *sounds):
            if packet.size:
                seam = None if packet.stream_index == picture.index else max(0, len(shown.pieces) - 1)
                scans[packet.stream_index].add(packet, seam)
    except av.FFmpegError:
        pass  # damaged; reading the frames reports it
    return {i: scan.pieces for i, scan in scans.items() if scan.pieces or scan is shown}


class StreamClock:
    """Shifts the packets of one stream, which have to come in file order, each of them once.

    FFmpeg gives the last picture before a jump ahead the time of the first one after it; that is corrected as well.
    """

    def __init__(self, offsets: list[Fraction], ends: list[Fraction], switches: list[tuple[int, int]]) -> None:
        self._offsets, self._ends, self._switches = offsets, ends, dict(switches)
        self._count, self._recording = 0, 0
        self._last, self._step = 0, 0  # decoding time of the previous packet, and the step to it

    def move(self, packet: av.Packet) -> bool:
        """Shift a packet by the offset of its recording; False if it is past the end of the recording's picture."""
        if packet.size:
            self._recording = self._switches.get(self._count, self._recording)
            self._count += 1
        if packet.dts is not None:
            if packet.pts is not None and (packet.pts - packet.dts) * packet.time_base > AHEAD:
                packet.pts = packet.dts + self._step
            self._last, self._step = packet.dts, max(1, packet.dts - self._last)
        offset = self._offsets[self._recording]
        if offset:
            ticks = round(offset / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks
        if packet.dts is None or self._recording >= len(self._ends):
            return True
        return packet.dts * packet.time_base < self._ends[self._recording]
