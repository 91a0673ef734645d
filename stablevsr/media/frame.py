"""The interfaces that all inputs and outputs share: a frame, a reader of frames, a writer of frames."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from inspect import GEN_RUNNING, getgeneratorstate
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np

from stablevsr.atomic import hidden_sibling, put_in_place, remove
from stablevsr.errors import InputError, ResourceError
from stablevsr.media.colour import Colours


@dataclass(frozen=True, eq=False)
class Frame:
    """One upright picture of a clip.

    image: (h, w, 3) RGB, never modified by this package; uint16 if the reader `is_deep`, else uint8, over the full
        range of the type.
    pts, duration: presentation time and duration in units of time_base seconds; None for stills.
    name: file name without a suffix; None for video.
    alpha: (h, w) of the image's type, 0 where transparent; None if there is no alpha.
    profile: the ICC profile of the image as stored in its file; None if there is none.
    """

    image: np.ndarray
    pts: int | None = None
    time_base: Fraction | None = None
    duration: int | None = None
    name: str | None = None
    alpha: np.ndarray | None = None
    profile: bytes | None = None


class Reader(ABC):
    """A clip, read one frame at a time; every `iter()` starts at the first frame.

    path: the file or folder as given.
    height, width: size in pixels of every frame, as displayed.
    frame_rate: frames per second, the average for video; 25 for stills.
    time_base: seconds per unit of the frames' pts (1 / frame_rate for stills, whose pts is None).
    sample_aspect_ratio: width over height of one pixel, as displayed.
    frame_count: number of frames; exact for stills, the file's claim for video (None if it makes none).
    part: which frames of the file these are, as text.
    has_audio: whether the file has sound.
    is_deep: whether it has more than 8 bits a channel.
    has_alpha: whether any frame has an alpha channel.
    pixel_format: FFmpeg's name of the format in which a pipe brings the frames; None for files.
    colours: how to interpret the RGB values.
    notices: messages for the user, complete once the reader is open.
    """

    path: Path
    height: int
    width: int
    frame_rate: Fraction
    time_base: Fraction
    sample_aspect_ratio: Fraction = Fraction(1)
    frame_count: int | None
    part: str = "all"
    has_audio: bool = False
    is_deep: bool = False
    has_alpha: bool = False
    pixel_format: str | None = None
    colours: Colours = Colours()
    notices: list[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notices = []
        self._resources = ExitStack()  # what stays open between passes
        self._passes: list[Generator[Frame, None, None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if any(getgeneratorstate(frames) == GEN_RUNNING for frames in self._passes):
            return  # a thread waits in one for more of a pipe: what it uses is freed after it, with the last reference
        for frames in self._passes:
            frames.close()
        self._resources.close()

    def __iter__(self) -> Generator[Frame, None, None]:
        """Yield all frames in display order. Raises InputError if a frame cannot be read."""
        return self._closed_at_exit(self._frames())

    def frame_times(self) -> Iterator[Fraction] | None:
        """Presentation times in seconds, without decoding; None if the file does not store them."""
        return None

    def frames_from(self, first: int) -> Generator[Frame, None, None]:
        """Yield the frames from number `first` (from 0) on: those of a full pass, but faster where possible."""
        return self._closed_at_exit(self._frames_from(first))

    def _closed_at_exit(self, frames: Generator[Frame, None, None]) -> Generator[Frame, None, None]:
        self._passes.append(frames)
        return frames

    def _frames_from(self, first: int) -> Generator[Frame, None, None]:
        with closing(self._frames()) as frames:
            yield from islice(frames, first, None)

    @abstractmethod
    def _frames(self) -> Generator[Frame, None, None]: ...


class Writer(ABC):
    """An output, written under a hidden temporary name and moved to `path` when the `with` block ends cleanly.

    If the block raises, the temporary is removed and whatever was at `path` stays.

    notices: messages for the user, complete once the writer is open.
    is_deep: whether it takes frames of 16 bits a channel.
    takes_alpha: whether frames may have a fourth channel.
    failures: messages about sound or subtitles that could not be added, complete after the block; the picture is in
        place all the same, and a command should exit with 1.
    """

    is_deep = False
    takes_alpha = False

    def __init__(self, path: Path, height: int, width: int, part: Path | None = None) -> None:
        self.path = path
        self._size = (height, width)
        self._part = part or hidden_sibling(path)
        self.notices: list[str] = []
        self.failures: list[str] = []
        remove(self._part)  # left by a process that was killed
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._count == 0:
                    raise InputError(f"{self.path} was not written because there was no frame to put in it")
                with self._reporting():
                    self._finish()
                put_in_place(self._part, self.path)
        finally:
            self._abandon()

    def write(self, image: np.ndarray, frame: Frame) -> None:
        """Append `image`: (height, width, 3) RGB, or RGBA if `takes_alpha`; uint8, or uint16 if `is_deep`.

        It was made from `frame`, whose pts and name it takes over. Raises ValueError for another shape or type,
        ResourceError if the output cannot be written.
        """
        wanted = np.uint16 if self.is_deep else np.uint8
        shapes = [(*self._size, channels) for channels in ((3, 4) if self.takes_alpha else (3,))]
        if image.shape not in shapes or image.dtype != wanted:
            raise ValueError(f"expected a {wanted.__name__} image of shape {shapes}, got {image.dtype} {image.shape}")
        self._write(image, frame)
        self._count += 1

    def keep(self, folder: Path) -> int:
        """Before the first frame: write to `folder` on the way, from where a later process can go on.

        Returns how many frames a process before has left there; those after them are to be written next. The same
        frames give the same output, whether it was interrupted or not.
        """
        return 0

    @abstractmethod
    def _write(self, image: np.ndarray, frame: Frame) -> None: ...

    @abstractmethod
    def _finish(self) -> None:
        """Complete the temporary and flush it to disk."""

    def _close(self) -> None:  # noqa: B027
        """Close the temporary, finished or not; must not raise."""

    def _abandon(self) -> None:
        # After a clean end there is nothing left to remove.
        self._close()
        remove(self._part)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            reason = error.strerror or error
            raise ResourceError(f"{self.path} could not be written ({reason}); choose another output") from error
