"""Writes RGB frames as a video file with the timing, sound and subtitles of the source."""

import os
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from stablevsr.atomic import remove, sync
from stablevsr.errors import OptionsError, ResourceError, UserError
from stablevsr.media.codecs import Encoding
from stablevsr.media.colour import Colours
from stablevsr.media.copies import TrackError
from stablevsr.media.demuxing import open_input
from stablevsr.media.frame import Frame, Reader, Writer
from stablevsr.media.joining import Companions, PacketTimes, join
from stablevsr.media.matroska import write_display_size
from stablevsr.media.paths import VIDEO_FORMATS
from stablevsr.media.picture_file import PictureFile, PictureFormat, SegmentedPicture
from stablevsr.media.profiles import to_srgb
from stablevsr.media.tags import Tags
from stablevsr.media.tracks import choose
from stablevsr.media.video_reader import VideoReader

_REHEARSED_FRAMES = 3  # enough for the encoder to reorder some
_REHEARSED_SECONDS = 2  # of every stream of the source


class VideoWriter(Writer):
    """A video in H.264 (VP9 in .webm) or as `encoding` says, in limited range, with the timestamps of its frames.

    Audio, subtitles, attachments, chapters and metadata of the source are kept. The picture is written first; the rest
    is muxed in at the end. Whatever fails then is reported in `failures`, and the picture is put in place without it.

    Matroska and WebM have no times before 0: if audio starts earlier, audio and video are delayed together.

    `source` gives the time base, the pixel aspect ratio unless `aspect` does, and, if it is a video, the other streams,
    read from its file again. Opening rehearses the whole with dummy frames and the first seconds of the source, and
    raises UserError for what encoder or container refuse: a missing encoder, a variable frame rate in .avi. Audio that
    neither fits the container nor can be decoded is dropped with a notice.
    """

    def __init__(
        self,
        path: Path,
        source: Reader,
        height: int,
        width: int,
        part: Path | None = None,
        encoding: Encoding | None = None,
        aspect: Fraction | None = None,
    ) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"video needs an even height and width, got {height}x{width}")
        super().__init__(path, height, width, part)
        suffix = path.suffix.lower()
        codec, options = (encoding or Encoding()).choose(suffix)
        codec = codec.for_source(source.is_deep)
        self.is_deep = codec.is_deep
        if source.is_deep and not self.is_deep:
            self.notices.append(
                f"{path.name} gets 8 bits a channel, though {source.path} has more; "
                "--codec hevc10 keeps 10 in .mp4, .mov and .mkv"
            )
        if source.colours.mastering and codec.encoder != "libx265":
            self.notices.append(
                f"{path.name} gets no HDR mastering metadata, which {source.path} has; --codec hevc10 keeps it"
            )
        if source.colours != Colours() and suffix == ".avi" and codec.encoder == "ffv1":
            self.notices.append(f"{path.name} cannot say that its colours are not BT.709's; a .mkv file can")
        aspect = aspect or source.sample_aspect_ratio
        if aspect != 1 and suffix == ".avi" and not codec.says_aspect:
            self.notices.append(f"{path.name} cannot say that {wider(aspect)}; a .mkv file can")
        # AVI counts frames instead of storing their times, so its clock must tick once per frame.
        self._counted = suffix == ".avi"
        time_base = 1 / source.frame_rate if self._counted else source.time_base
        self._how = PictureFormat(
            VIDEO_FORMATS[suffix],
            codec,
            options,
            height,
            width,
            source.frame_rate,
            time_base,
            aspect,
            source.colours,
        )
        self._tick: int | None = None
        self._picture: PictureFile | SegmentedPicture | None = None
        self._joined = self._part.with_name(self._part.name + ".joined")
        self._source = source.path
        self._companions: Companions | None = None
        self._open(source)

    def keep(self, folder: Path) -> int:
        self._open_picture.close()
        remove(self._part)
        with self._reporting():
            self._picture = SegmentedPicture(folder, self._part, self._how)
        self._count, self._tick = self._picture.count, self._picture.last_tick
        return self._count

    def _open(self, source: Reader) -> None:
        try:
            self._check_times(source)
            with self._reporting():
                if isinstance(source, VideoReader):
                    self._choose(source)
                self._rehearse()
                self._picture = PictureFile(self._part, self._how)
        except BaseException:
            self._abandon()
            raise

    def _check_times(self, source: Reader) -> None:
        times = source.frame_times() if self._counted else None
        last = None
        for number, time in enumerate(times or (), 1):
            tick = round(time / self._how.time_base)
            if last is not None and tick <= last:
                raise self._uneven(number)
            last = tick

    def _choose(self, source: VideoReader) -> None:
        choices = choose(source.path, self._how.form, self.path, source.timeline)
        self.notices += choices.notices
        with open_input(source.path) as container:
            tags = Tags.of(container)
        if tags.chapters and self._how.form == "avi":
            self.notices.append(f"{self.path.suffix} cannot hold chapters, so they are left out")
        self._companions = Companions(source.path, source.timeline, choices.streams, tags)

    def _rehearse(self) -> None:
        """Write a short file of the same kind and delete it."""
        draft = self._part.with_name(self._part.name + ".rehearsal")
        try:
            times = self._draft_picture(draft)
            if self._companions:
                self._join(draft, times, self._companions, until=Fraction(_REHEARSED_SECONDS))
        except TrackError as error:
            raise OptionsError(
                f"{self.path} cannot hold stream {error.index} of {self._source} ({error}); write a .mkv "
                "file, or take that stream out first"
            ) from error
        except (av.ArgumentError, av.ExternalError) as error:  # all that encoders say of a size beyond their limits
            how = self._how
            raise ResourceError(
                f"{self.path} could not be written by {how.codec.encoder} at {how.width}x{how.height} "
                f"({error.strerror}); choose another size, codec or output"
            ) from error
        finally:
            remove(draft)
            remove(self._joined)

    def _draft_picture(self, draft: Path) -> list[PacketTimes]:
        picture = PictureFile(draft, self._how)
        try:
            image = np.zeros((*self._size, 3), np.uint16 if self.is_deep else np.uint8)
            step = max(1, round(1 / self._how.rate / self._how.time_base))
            for i in range(_REHEARSED_FRAMES):
                picture.write(image, i * step, step)
            picture.finish()
        finally:
            picture.close()
        return picture.times

    def _write(self, image: np.ndarray, frame: Frame) -> None:
        self._tick = self._next_tick(frame)
        if frame.profile:  # videos have none
            image = to_srgb(image, frame.profile)
        with self._reporting():
            self._open_picture.write(image, self._tick, self._duration(frame))

    def _next_tick(self, frame: Frame) -> int:
        seconds = self._count / self._how.rate if frame.pts is None else _seconds(frame.pts, frame)
        tick = round(seconds / self._how.time_base)
        if self._tick is None or tick > self._tick:
            return tick
        if self._counted:
            raise self._uneven(self._count + 1)
        return self._tick + 1  # encoders refuse equal times; one tick is invisible

    def _uneven(self, number: int) -> OptionsError:
        return OptionsError(
            f"{self.path} cannot be written because .avi has a constant frame rate and the frames "
            f"do not (frame {number}); use .mkv"
        )

    def _duration(self, frame: Frame) -> int:
        seconds = 1 / self._how.rate if frame.duration is None else _seconds(frame.duration, frame)
        return max(1, round(seconds / self._how.time_base))

    def _finish(self) -> None:
        picture = self._open_picture
        picture.finish()
        sync(self._part)  # the picture is safe from here on
        if self._companions:
            self._add(self._companions, picture.times)
        self._shape_pixels()

    def _shape_pixels(self) -> None:
        """Say what shape pixels have where neither encoder nor muxer has."""
        how = self._how
        if how.aspect == 1 or how.codec.says_aspect or how.form not in ("matroska", "webm"):
            return
        if not write_display_size(self._part, how.width, how.height, how.aspect):
            self.failures.append(f"it does not say that {wider(how.aspect)}")
        sync(self._part)

    @property
    def _open_picture(self) -> PictureFile | SegmentedPicture:
        assert self._picture
        return self._picture

    def _add(self, companions: Companions, times: list[PacketTimes]) -> None:
        """Replace the picture by a file with all streams; on failure drop the stream at fault, or keep the picture."""
        while True:
            try:
                failures = self._join(self._part, times, companions)
                sync(self._joined)
                os.replace(self._joined, self._part)
            except TrackError as error:
                left = [choice for choice in companions.streams if choice.index != error.index]
                self.failures.append(f"stream {error.index} of {companions.source} is missing ({error})")
                companions = replace(companions, streams=left)
            except (av.FFmpegError, OSError, ValueError, UserError) as error:
                reason = getattr(error, "strerror", None) or error
                self.failures.append(f"sound, subtitles and metadata of {companions.source} are missing ({reason})")
                return
            else:
                self.failures += failures
                return

    def _join(
        self, picture: Path, times: list[PacketTimes], companions: Companions, until: Fraction | None = None
    ) -> list[str]:
        return join(picture, times, companions, self._joined, self._how.form, until)

    def _close(self) -> None:
        if self._picture:
            self._picture.close()
        with suppress(OSError):
            remove(self._joined)


def wider(aspect: Fraction) -> str:
    """What shape pixels have, for a message."""
    return f"its pixels are {float(aspect):.3g} times as wide as high"


def _seconds(ticks: int, frame: Frame) -> Fraction:
    assert frame.time_base is not None
    return ticks * frame.time_base
