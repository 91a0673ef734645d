"""Re-encodes sound for containers that cannot hold it as it is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

# The usual codec of each container; Matroska holds nearly everything, so it is rarely needed there. AVI stores no start
# time, so AC-3 rather than MP3: its encoder delay is 5 ms, not 50.
ENCODERS = {"mp4": "aac", "mov": "aac", "webm": "libopus", "avi": "ac3", "matroska": "aac"}
_LOSSLESS = {"matroska": "flac"}  # for lossless sources
# Vorbis's layouts for 1 to 8 channels, which every multichannel encoder knows.
_LAYOUTS = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")
_BITS_PER_CHANNEL = 96_000  # per second; near transparent for AAC and Opus
TOLERANCE = Fraction(1, 50)  # seconds of drift before sound is corrected; less is not noticed beside a picture


@dataclass(frozen=True)
class SoundFormat:
    """How sound is encoded: FFmpeg's encoder, sampling rate in Hz, channel layout and sample format."""

    encoder: str
    rate: int
    layout: str
    sample_format: str

    def add_to(self, output: av.container.OutputContainer) -> av.AudioStream:
        """Add a stream of this format to `output`."""
        stream = output.add_stream(self.encoder, rate=self.rate, layout=self.layout)
        assert isinstance(stream, av.AudioStream)
        self._describe(stream.codec_context)
        return stream

    def works(self) -> bool:
        """Whether the encoder accepts this format."""
        context = av.CodecContext.create(self.encoder, "w")
        assert isinstance(context, av.AudioCodecContext)
        context.rate, context.layout, context.time_base = self.rate, self.layout, Fraction(1, self.rate)
        self._describe(context)
        try:
            context.open()
        except (av.FFmpegError, ValueError):
            return False
        return True

    def _describe(self, context: av.AudioCodecContext) -> None:
        context.format = self.sample_format
        if self.encoder in ("aac", "libopus"):
            context.bit_rate = _BITS_PER_CHANNEL * context.layout.nb_channels


def default_layout(stream: av.AudioStream) -> str | None:
    """The usual layout for the number of channels if a stream does not specify one; else None."""
    layout = stream.codec_context.layout
    # FFmpeg names a layout without an order by its number of channels only.
    if not 1 <= layout.nb_channels <= len(_LAYOUTS) or not layout.name.endswith("channels"):
        return None
    return _LAYOUTS[layout.nb_channels - 1]


def sound_format(stream: av.AudioStream, form: str) -> SoundFormat | None:
    """Choose how to encode `stream` for the container `form` (FFmpeg's name), keeping its channels if possible.

    None if FFmpeg cannot decode it or lacks the encoder.
    """
    name = ENCODERS.get(form)
    if stream.codec_context is None or name is None or not stream.codec_context.layout.nb_channels:
        return None
    if stream.codec_context.codec.lossless and not stream.codec_context.codec.lossy:
        name = _LOSSLESS.get(form, name)
    try:
        codec = av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return None
    rate = _nearest(stream.codec_context.sample_rate, codec.audio_rates)
    layouts = [default_layout(stream) or stream.codec_context.layout.name, "stereo"]
    layouts[1:1] = _LAYOUTS[stream.codec_context.layout.nb_channels - 1 :][:1]
    formats = [form.name for form in codec.audio_formats or ()]
    sample_format = formats[0]
    if "s32" in formats and stream.codec_context.format.bytes > 2:
        sample_format = "s32"
    candidates = (SoundFormat(codec.name, rate, layout, sample_format) for layout in layouts)
    return next((candidate for candidate in candidates if candidate.works()), None)


def can_decode(stream: av.AudioStream, packets: list[av.Packet]) -> bool:
    """Whether any of the first packets of `stream` can be decoded; True if there are none."""
    for packet in packets:
        try:
            packet.decode()
        except av.FFmpegError:
            continue
        return True
    return not packets


def _nearest(rate: int, allowed: list[int] | None) -> int:
    """The rate itself if allowed, else the next higher one, else the highest."""
    if not allowed or rate in allowed:
        return rate
    return min((r for r in allowed if r > rate), default=max(allowed))


class SoundTrack:
    """Decodes the packets of one stream, aligns them in time and encodes them again.

    Gaps become silence and overlaps are cut, so that every sample keeps its time. `origin`: the second at which the
    sound has to start, for containers that cannot store a late start; None keeps the start of the source.
    """

    def __init__(
        self, source: av.AudioStream, output: av.container.OutputContainer, how: SoundFormat, origin: Fraction | None
    ) -> None:
        self.stream, self._rate = how.add_to(output), how.rate
        self._decoder, self._layout = source.codec_context, default_layout(source)
        self._resampler = av.AudioResampler(how.sample_format, how.layout, how.rate)
        self._position = None if origin is None else round(origin * how.rate)
        self.damaged, self._heard = 0, False

    def feed(self, packet: av.Packet) -> list[av.Packet]:
        """Return encoded packets; one that cannot be decoded becomes silence and is counted in `damaged`."""
        try:
            frames = self._decoder.decode(packet)
        except av.FFmpegError:
            self.damaged += self._heard  # recordings may start inside a packet
            return []
        self._heard = self._heard or bool(frames)
        return self._encode(frames)

    def finish(self) -> list[av.Packet]:
        """Flush decoder, resampler and encoder."""
        try:
            rest = self._decoder.decode(None)
        except av.FFmpegError:
            rest = []
        return [*self._encode(rest), *self._encode([None]), *self.stream.encode(None)]

    def _encode(self, frames: Iterable[av.AudioFrame | None]) -> list[av.Packet]:
        return [
            packet
            for frame in frames
            for part in self._resampler.resample(frame)
            for placed in self._placed(part)
            for packet in self.stream.encode(placed)
        ]

    def _placed(self, frame: av.AudioFrame) -> Iterator[av.AudioFrame]:
        samples = frame.to_ndarray()
        width = 1 if frame.format.is_planar else len(frame.layout.channels)  # columns per sample
        start = self._position or 0
        if frame.pts is not None and frame.time_base is not None:
            start = round(frame.pts * frame.time_base * self._rate)
        self._position = start if self._position is None else self._position
        gap, first = start - self._position, 0
        if gap > TOLERANCE * self._rate:
            yield from self._silence(frame, samples, gap, width)
        elif gap < -TOLERANCE * self._rate:
            first = min(-gap, samples.shape[1] // width)
        if samples.shape[1] > first * width:
            yield self._frame(frame, samples[:, first * width :], width)

    def _silence(self, like: av.AudioFrame, samples: np.ndarray, count: int, width: int) -> Iterator[av.AudioFrame]:
        quiet = 128 if samples.dtype == np.uint8 else 0
        while count > 0:
            now = min(count, self._rate)
            yield self._frame(like, np.full((samples.shape[0], now * width), quiet, samples.dtype), width)
            count -= now

    def _frame(self, like: av.AudioFrame, samples: np.ndarray, width: int) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=like.format.name, layout=like.layout)
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._position
        self._position += samples.shape[1] // width
        return frame
