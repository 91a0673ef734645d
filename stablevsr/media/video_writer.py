"""A video file written from RGB frames, with the timing and the audio of the source."""

from contextlib import suppress
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags

from stablevsr.atomic import sync
from stablevsr.errors import UserError
from stablevsr.media.codecs import Encoding
from stablevsr.media.colour import TAGS, to_frame
from stablevsr.media.copies import StreamCopies
from stablevsr.media.frame import Frame, Reader, Writer
from stablevsr.media.paths import VIDEO_FORMATS
from stablevsr.media.video_reader import VideoReader

_MUXER_OPTIONS = {
    # The default of 1000 would round a late start of a stream to milliseconds.
    "mp4": {"movie_timescale": "90000"},
    "mov": {"movie_timescale": "90000"},
    # FFmpeg moves the whole file later when audio starts before 0 (AAC always does), which AVI would round to a frame.
    "avi": {"avoid_negative_ts": "disabled"},
}


class VideoWriter(Writer):
    """H.264 (VP9 in .webm) or what `encoding` says, YUV in BT.709, with the timestamps of the frames written.

    Audio, subtitles, chapters and main metadata of the source come along.

    Matroska and WebM cannot hold times before 0: where audio starts there, audio and video move later together.

    `source` gives the clock, the pixels' aspect ratio and, when it is a video, the audio, read from its file afresh.
    Raises UserError when the encoder is missing, or for audio that neither fits the container nor can be decoded.
    """

    def __init__(
        self,
        path: Path,
        source: Reader,
        height: int,
        width: int,
        part: Path | None = None,
        encoding: Encoding | None = None,
    ) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"video needs an even height and width, got {height}x{width}")
        super().__init__(path, height, width, part)
        self._codec, self._options = (encoding or Encoding()).choose(path.suffix.lower())
        self.is_deep = self._codec.is_deep
        if source.is_deep and not self.is_deep:
            self.notices.append(
                f"{path.name} gets 8 bits a channel, though {source.path} has more; "
                "--codec hevc10 keeps 10 in .mp4, .mov and .mkv."
            )
        # AVI counts frames instead of storing their times, so its clock must tick once per frame.
        self._counted = path.suffix.lower() == ".avi"
        self._rate = source.frame_rate
        self._time_base = 1 / self._rate if self._counted else source.time_base
        self._tick: int | None = None
        self._container: av.container.OutputContainer | None = None
        self._copies: StreamCopies | None = None
        try:
            with self._reporting():
                self._open(source)
        except BaseException:
            self._abandon()
            raise

    def _open(self, source: Reader) -> None:
        form = VIDEO_FORMATS[self.path.suffix.lower()]
        self._container = av.open(str(self._part), "w", format=form, container_options=_MUXER_OPTIONS.get(form))
        self._stream = self._add_video(self._codec.encoder, self._options, source)
        if isinstance(source, VideoReader):
            self._copies = StreamCopies(source.path, self._container, self.path)
            self.notices += self._copies.notices
        self._container.start_encoding()  # an encoder that cannot do this fails now, not after the first frame's work

    def _add_video(self, codec: str, options: dict[str, str], source: Reader) -> av.VideoStream:
        if codec not in av.codecs_available:
            raise UserError(f"{self.path} needs the encoder {codec}, which this PyAV lacks; install PyAV from PyPI.")
        height, width = self._size
        stream = self._container.add_stream(
            codec, rate=self._rate, options=options, height=height, width=width, time_base=self._time_base
        )
        context = stream.codec_context
        context.pix_fmt = self._codec.pix_fmt
        context.sample_aspect_ratio = source.sample_aspect_ratio
        context.flags |= Flags.frame_duration  # else the last frame of a variable rate would lose its length
        if self._counted:
            context.max_b_frames = 0  # AVI cannot store an order of decoding
        for name, value in TAGS.items() if self._codec.pix_fmt.startswith("yuv") else ():
            setattr(context, name, value)
        return stream

    def _write(self, image: np.ndarray, frame: Frame) -> None:
        picture = to_frame(image, self._codec.pix_fmt)
        picture.time_base = self._time_base
        picture.pts = self._tick = self._next_tick(frame)
        picture.duration = self._duration(frame)
        with self._reporting():
            self._mux(picture)

    def _next_tick(self, frame: Frame) -> int:
        seconds = self._count / self._rate if frame.pts is None else frame.pts * frame.time_base
        tick = round(seconds / self._time_base)
        if self._tick is None or tick > self._tick:
            return tick
        if self._counted:
            raise UserError(
                f"{self.path} cannot be written because .avi has a constant frame rate and the frames "
                f"do not (frame {self._count + 1}); use .mkv."
            )
        return self._tick + 1  # encoders refuse two frames at one time; one tick later nobody can see

    def _duration(self, frame: Frame) -> int:
        seconds = 1 / self._rate if frame.duration is None else frame.duration * frame.time_base
        return max(1, round(seconds / self._time_base))

    def _mux(self, picture: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(picture):
            if picture is None and self._count < 3:
                # x265 learns from the third frame how far decoding runs ahead; without one, its decoding times are
                # uninitialised memory. No frame of so short a clip is out of order, whatever the encoder.
                packet.dts = packet.pts
            time = packet.dts * packet.time_base
            self._container.mux_one(packet)
            if self._copies:
                self._copies.copy_until(time)

    def _finish(self) -> None:
        self._mux(None)
        if self._copies:
            self._copies.copy_until(None)
        self._container.close()
        sync(self._part)

    def _close(self) -> None:
        if self._copies:
            self._copies.close()
        if self._container:
            with suppress(av.FFmpegError):  # writes the end of a file that is about to be deleted
                self._container.close()
