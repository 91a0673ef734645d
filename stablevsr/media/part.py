"""A part of a clip."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from itertools import islice

from stablevsr.errors import OptionsError
from stablevsr.media.frame import Frame, Reader


class PartReader(Reader):
    """Frames `first` to `last` (exclusive, from 0) of another reader, with times that start at 0.

    Raises OptionsError if the part is empty; where the source does not know its length, only when it is read.
    """

    def __init__(self, source: Reader, first: int, last: int | None) -> None:
        super().__init__(source.path)
        count = source.frame_count
        if first < 0 or (last is not None and last <= first):
            raise OptionsError(
                f"frames {first}:{'' if last is None else last} are none; give first:last, counted from 0"
            )
        if count is not None and first >= count:
            raise OptionsError(f"{source.path} has {count} frames, so there is no frame {first}; give a part inside")
        self._source, self._first, self._last = source, first, last
        self.part = f"{first}:{'' if last is None else last}"
        self.height, self.width = source.height, source.width
        self.frame_rate, self.time_base = source.frame_rate, source.time_base
        self.sample_aspect_ratio = source.sample_aspect_ratio
        self.is_deep, self.has_alpha, self.colours = source.is_deep, source.has_alpha, source.colours
        self.pixel_format = source.pixel_format
        self.frame_count = None if count is None else min(count, last or count) - first
        self.notices = [*source.notices]
        if source.has_audio:
            self.notices.append(f"{source.path}: only a part is taken, without its audio")

    def frame_times(self) -> Iterator[Fraction] | None:
        """Presentation times in seconds, the first of which is 0; None if the source does not know them."""
        times = self._source.frame_times()
        if times is None:
            return None
        found = list(islice(times, self._first, self._last))
        return iter([time - found[0] for time in found])

    def _frames(self) -> Generator[Frame, None, None]:
        start, found = None, False
        count = None if self._last is None else self._last - self._first
        with closing(self._source.frames_from(self._first)) as frames:
            for frame in islice(frames, count):
                if frame.pts is not None:
                    start = frame.pts if start is None else start
                    frame = replace(frame, pts=frame.pts - start)
                yield frame
                found = True
        if not found:
            raise OptionsError(f"{self.path} ends before frame {self._first}; give a part inside")
