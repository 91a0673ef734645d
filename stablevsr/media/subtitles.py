"""Text subtitles from one way of writing them to another."""

from fractions import Fraction

import av

# What each container's users expect; AVI has none.
ENCODERS = {"mp4": "mov_text", "mov": "mov_text", "webm": "webvtt", "matroska": "subrip"}
_MILLISECOND = Fraction(1, 1000)
_UNSET = 2**32 - 1  # FFmpeg's end of a subtitle that stays until the next one


def can_convert(stream: av.stream.Stream, form: str) -> bool:
    """Whether the subtitles are text (and not pictures) and the container `form` holds some kind of text."""
    context = stream.codec_context
    return context is not None and context.codec.text_sub and form in ENCODERS


class TextTrack:
    """Packets of one stream of text, decoded to ASS and encoded again."""

    def __init__(self, source: av.stream.Stream, output: av.container.OutputContainer, form: str) -> None:
        self._decoder = source.codec_context
        self.stream = output.add_stream(ENCODERS[form])
        self._decoder.open(strict=False)  # makes the header
        self.stream.codec_context.subtitle_header = self._decoder.subtitle_header
        self.stream.codec_context.time_base = _MILLISECOND
        self.stream.time_base = _MILLISECOND
        self.damaged = 0

    def feed(self, packet: av.Packet) -> list[av.Packet]:
        """The same words in one packet; none for an empty one, which only ends the words before it."""
        try:
            found = self._decoder.decode2(packet)
        except av.FFmpegError:
            self.damaged += 1
            return []
        lines = [line.ass for line in found or () if isinstance(line, av.subtitles.subtitle.AssSubtitle)]
        if not lines or packet.pts is None:
            return []
        duration = round((packet.duration or 0) * packet.time_base / _MILLISECOND)
        if not duration and found.end_display_time != _UNSET:
            duration = found.end_display_time - found.start_display_time
        start = round(packet.pts * packet.time_base / _MILLISECOND)
        words = av.subtitles.subtitle.SubtitleSet.create(_joined(lines), start=0, end=duration, pts=start)
        encoded = self.stream.codec_context.encode_subtitle(words)
        encoded.pts = encoded.dts = start
        encoded.duration, encoded.time_base, encoded.stream = duration, _MILLISECOND, self.stream
        return [encoded]

    def finish(self) -> list[av.Packet]:
        """Nothing is held back."""
        return []


def _joined(lines: list[bytes]) -> bytes:
    """Several lines of ASS at one time as one: the fields of the first, the texts of all."""
    return b"\\N".join([lines[0], *(line.split(b",", 8)[-1] for line in lines[1:])])
