"""Converts text subtitles between formats."""

from dataclasses import dataclass, replace
from fractions import Fraction

import av
from av.subtitles.codeccontext import SubtitleCodecContext
from av.subtitles.stream import SubtitleStream
from av.subtitles.subtitle import AssSubtitle, SubtitleSet

# The usual format of each container; AVI has none.
ENCODERS = {"mp4": "mov_text", "mov": "mov_text", "webm": "webvtt", "matroska": "subrip"}
_MILLISECOND = Fraction(1, 1000)
_UNSET = 2**32 - 1  # FFmpeg's end time of a subtitle that stays until the next one


def can_convert(stream: av.stream.Stream, form: str) -> bool:
    """Whether the subtitles are text, not pictures, and the container `form` takes text subtitles."""
    context = stream.codec_context
    return context is not None and context.codec.text_sub and form in ENCODERS


@dataclass(frozen=True)
class _Cue:
    """ASS lines that are shown together; times in milliseconds."""

    start: int
    duration: int
    lines: list[bytes]


class TextTrack:
    """Decodes the packets of one text stream to ASS and encodes them again.

    For formats that show one cue at a time, cues with the same start are joined and each ends where the next starts.
    """

    def __init__(self, source: av.stream.Stream, output: av.container.OutputContainer, form: str) -> None:
        decoder, self.stream = source.codec_context, output.add_stream(ENCODERS[form])
        assert isinstance(decoder, SubtitleCodecContext)
        assert isinstance(self.stream, SubtitleStream)
        self._decoder, self._encoder = decoder, self.stream.codec_context
        self._one_at_a_time = ENCODERS[form] == "mov_text"
        self._held: _Cue | None = None
        self._decoder.open(strict=False)  # makes the header
        self._encoder.subtitle_header = self._decoder.subtitle_header
        self._encoder.time_base = _MILLISECOND
        self.stream.time_base = _MILLISECOND
        self.damaged = 0

    def feed(self, packet: av.Packet) -> list[av.Packet]:
        """Return encoded packets; an empty input, which only ends the previous cue, gives none."""
        try:
            found = self._decoder.decode2(packet)
        except av.FFmpegError:
            self.damaged += 1
            return []
        lines = [line.ass for line in found or () if isinstance(line, AssSubtitle)]
        if not found or not lines or packet.pts is None:
            return []
        duration = round((packet.duration or 0) * packet.time_base / _MILLISECOND)
        if not duration and found.end_display_time != _UNSET:
            duration = found.end_display_time - found.start_display_time
        cue = _Cue(round(packet.pts * packet.time_base / _MILLISECOND), duration, lines)
        return self._in_turn(cue) if self._one_at_a_time else [self._encoded(cue)]

    def finish(self) -> list[av.Packet]:
        """Return the cue that was held back."""
        held, self._held = self._held, None
        return [self._encoded(held)] if held else []

    def _in_turn(self, cue: _Cue) -> list[av.Packet]:
        held, self._held = self._held, cue
        if held is None:
            return []
        if cue.start <= held.start:
            self._held = _Cue(held.start, max(held.duration, cue.duration), held.lines + cue.lines)
            return []
        return [self._encoded(replace(held, duration=min(held.duration, cue.start - held.start)))]

    def _encoded(self, cue: _Cue) -> av.Packet:
        words = SubtitleSet.create(_joined(cue.lines), start=0, end=cue.duration, pts=cue.start)
        packet = self._encoder.encode_subtitle(words)
        packet.pts = packet.dts = cue.start
        packet.duration, packet.time_base, packet.stream = cue.duration, _MILLISECOND, self.stream
        return packet


def _joined(lines: list[bytes]) -> bytes:
    """Join ASS lines: the fields of the first, the texts of all."""
    return b"\\N".join([lines[0], *(line.split(b",", 8)[-1] for line in lines[1:])])
