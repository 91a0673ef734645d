"""Taking sound and subtitles of a source file along, packet by packet where the new container can hold them."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Discard

from stablevsr.errors import UserError
from stablevsr.media.video_reader import open_input

_ENCODERS = {  # for sound that the container cannot hold; Matroska holds everything
    "mp4": "aac",
    "mov": "aac",
    "webm": "libopus",
    "avi": "mp3",
}
_OF_THE_FILE = ("encoder", "major_brand", "minor_version", "compatible_brands", "duration", "creation_time")


class StreamCopies:
    """All audio and subtitle streams of the file at `source`, fed to `output` in step with its video.

    The file is opened here afresh, so it does not matter how far its video has been read; one packet is held at a
    time. Chapters and main metadata come along, too. `notices` says what had to be encoded again or left out.
    Raises UserError when `output`, which becomes the file at `target`, cannot hold a sound that cannot be decoded.
    """

    def __init__(self, source: Path, output: av.container.OutputContainer, target: Path) -> None:
        self._source, self._output, self._target = source, output, target
        self._input = open_input(source)
        self.notices: list[str] = []
        self._copies: dict[int, av.stream.Stream] = {}
        self._recoders: dict[int, _Recoder] = {}
        for stream in self._input.streams:
            if stream.type == "audio":
                self._add_audio(stream)
            elif stream.type == "subtitle":
                self._add_subtitles(stream)
        for stream in self._input.streams:
            if stream.index not in self._copies and stream.index not in self._recoders:
                stream.discard = Discard.all  # lets the demuxer skip the video's bytes
        output.metadata.update({k: v for k, v in self._input.metadata.items() if k.lower() not in _OF_THE_FILE})
        output.set_chapters(self._input.chapters())
        self._packets = self._read()
        self._next = next(self._packets, None)

    def copy_until(self, time: Fraction | None) -> None:
        """Write the packets that are due by `time` seconds; all that are left for None."""
        while self._next is not None and (time is None or self._next.dts * self._next.time_base <= time):
            index = self._next.stream_index
            if index in self._recoders:
                self._output.mux(self._recoders[index].encode(self._next))
            else:
                self._next.stream = self._copies[index]
                self._output.mux_one(self._next)
            self._next = next(self._packets, None)
        if time is None:
            for recoder in self._recoders.values():
                self._output.mux(recoder.finish())

    def close(self) -> None:
        self._input.close()

    def _add_audio(self, stream: av.AudioStream) -> None:
        try:
            copy = self._copies[stream.index] = self._output.add_stream_from_template(stream)
        except ValueError as error:
            codec = getattr(stream, "name", None)  # absent when FFmpeg does not know the codec
            encoder = _ENCODERS.get(self._output.format.name)
            if codec is None or encoder not in av.codecs_available:
                way_out = "convert that audio" if self._target.suffix == ".mkv" else "write a .mkv file"
                raise UserError(
                    f"{self._target} cannot hold the {codec or 'unknown'} audio of {self._source}; {way_out} instead."
                ) from error
            self._recoders[stream.index] = _Recoder(stream, self._output, encoder)
            copy = self._recoders[stream.index].stream
            self.notices.append(
                f"{self._target.suffix} cannot hold {codec} audio, so it is encoded again as {copy.name}; "
                "a .mkv file would keep it."
            )
        _describe(copy, stream)

    def _add_subtitles(self, stream: av.stream.Stream) -> None:
        try:
            copy = self._copies[stream.index] = self._output.add_stream_from_template(stream)
        except ValueError:
            codec = getattr(stream, "name", None) or "unknown"
            self.notices.append(f"{self._target.suffix} cannot hold {codec} subtitles, so they are left out.")
        else:
            _describe(copy, stream)

    def _read(self) -> Iterator[av.Packet]:
        wanted = [self._input.streams[index] for index in (*self._copies, *self._recoders)]
        packets = self._input.demux(*wanted) if wanted else iter(())
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                raise UserError(
                    f"The audio of {self._source} cannot be read to its end ({error.strerror}); repair the file first."
                ) from error
            if packet is None:
                return
            if packet.dts is not None:  # the demuxer ends with an empty packet per stream
                yield packet


class _Recoder:
    """Sound decoded and encoded again."""

    def __init__(self, source: av.AudioStream, output: av.container.OutputContainer, encoder: str) -> None:
        context = source.codec_context
        # Opus knows 48 kHz only; the others take what comes, within their own lists.
        rate = 48000 if encoder == "libopus" else min(context.sample_rate, 48000)
        layout = context.layout.name if context.layout.nb_channels <= 2 or encoder == "aac" else "stereo"
        self.stream = output.add_stream(encoder, rate=rate, layout=layout)
        self._decoder = context
        self._resampler = av.AudioResampler(self.stream.codec_context.format, layout, rate)

    def encode(self, packet: av.Packet) -> list[av.Packet]:
        return self._pack(packet.decode())

    def finish(self) -> list[av.Packet]:
        # What decoder, resampler and encoder still hold, in this order.
        return [*self._pack(self._decoder.decode(None)), *self._pack([None]), *self.stream.encode(None)]

    def _pack(self, frames: list[av.AudioFrame | None]) -> list[av.Packet]:
        return [out for frame in frames for part in self._resampler.resample(frame) for out in self.stream.encode(part)]


def _describe(copy: av.stream.Stream, stream: av.stream.Stream) -> None:
    copy.disposition = stream.disposition
    copy.metadata.update({key: value for key, value in stream.metadata.items() if key in ("language", "title")})
