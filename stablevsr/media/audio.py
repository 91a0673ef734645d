"""Copying the audio of a source file into an output, packet by packet, without decoding it."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Discard

from stablevsr.errors import UserError
from stablevsr.media.video_reader import open_input


class AudioCopy:
    """All audio streams of the file at `source`, fed to `output` in step with its video.

    The file is opened here afresh, so it does not matter how far its video has been read; one packet is held at a
    time. Raises UserError when `output`, which becomes the file at `target`, cannot hold one of the codecs.
    """

    def __init__(self, source: Path, output: av.container.OutputContainer, target: Path) -> None:
        self._source, self._output = source, output
        self._input = open_input(source)
        self._streams = {}
        for stream in self._input.streams:
            if stream.type == "audio":
                self._streams[stream.index] = self._add(stream, target)
            else:
                stream.discard = Discard.all  # lets the demuxer skip the video's bytes
        self._packets = self._read()
        self._next = next(self._packets, None)

    def copy_until(self, time: Fraction | None) -> None:
        """Write the audio packets that are due by `time` seconds; all that are left for None."""
        while self._next is not None and (time is None or self._next.dts * self._next.time_base <= time):
            self._next.stream = self._streams[self._next.stream_index]
            self._output.mux_one(self._next)
            self._next = next(self._packets, None)

    def close(self) -> None:
        self._input.close()

    def _add(self, stream: av.AudioStream, target: Path) -> av.AudioStream:
        try:
            copy = self._output.add_stream_from_template(stream)
        except ValueError as error:
            codec = getattr(stream, "name", "unknown")  # absent when FFmpeg does not know the codec
            way_out = "convert that audio" if target.suffix == ".mkv" else "write a .mkv file"
            raise UserError(f"{target} cannot hold the {codec} audio of {self._source}; {way_out} instead.") from error
        copy.disposition = stream.disposition
        copy.metadata.update({key: value for key, value in stream.metadata.items() if key in ("language", "title")})
        return copy

    def _read(self) -> Iterator[av.Packet]:
        packets = self._input.demux(*self._input.streams.audio) if self._streams else iter(())
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
