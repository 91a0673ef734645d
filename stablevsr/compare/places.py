"""Telling excerpts of a clip: crops, and the temporal profile."""

from dataclasses import dataclass, field

import numpy as np

from stablevsr.errors import OptionsError

CROP = 64  # side of an automatic crop, in pixels
MAX_CROPS = 3  # automatic ones
STEP = 2  # every second pixel is examined
MAX_ROWS = 600  # of a temporal profile, which takes every k-th frame of longer clips


@dataclass(frozen=True)
class Crop:
    """A square of a frame: its top left corner, its side, and the frame (None: the middle one)."""

    x: int
    y: int
    size: int
    frame: int | None = None

    def check(self, height: int, width: int, frames: int) -> None:
        """Raise `OptionsError` unless it lies inside a clip."""
        inside = self.size > 0 and 0 <= self.x <= width - self.size and 0 <= self.y <= height - self.size
        if not inside:
            raise OptionsError(
                f"the crop {self.x},{self.y},{self.size} is not inside {width}x{height}; "
                "give x and y of its top left corner, and its side"
            )
        if self.frame is not None and not 0 <= self.frame < frames:
            raise OptionsError(
                f"got a crop of frame {self.frame}, but frames are 0 to {frames - 1}; choose one of them"
            )

    def resolved_frame(self, frames: int) -> int:
        """Its frame in a clip of `frames` frames."""
        return frames // 2 if self.frame is None else self.frame

    def cut(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The square in every version (h, w, 3)."""
        return [image[self.y : self.y + self.size, self.x : self.x + self.size].copy() for image in images]

    def overlaps(self, other: "Crop") -> bool:
        """Whether the squares overlap, whatever their frames."""
        return abs(self.x - other.x) < self.size and abs(self.y - other.y) < self.size


@dataclass
class FoundCrops:
    """The crops of a clip where the versions differ most, found in one pass; only they are kept in memory."""

    found: list[tuple[float, Crop, list[np.ndarray]]] = field(default_factory=list)  # difference, place, versions

    def add(self, frame: int, images: list[np.ndarray]) -> None:
        """Examine a frame: its versions, (h, w, 3) uint8 each."""
        height, width = images[0].shape[:2]
        size = min(CROP, height, width)
        values = np.stack([image[::STEP, ::STEP] for image in images])
        spread = (values.max(0) - values.min(0)).mean(-1)
        for difference, y, x in _peaks(spread, max(size // STEP, 1)):
            crop = Crop(min(STEP * x, width - size), min(STEP * y, height - size), size, frame)
            self._consider(difference, crop, images)

    def _consider(self, difference: float, crop: Crop, images: list[np.ndarray]) -> None:
        rivals = [entry for entry in self.found if entry[1].overlaps(crop)]
        if not rivals and len(self.found) == MAX_CROPS:
            rivals = [min(self.found, key=lambda entry: entry[0])]
        if difference > 0 and all(difference > entry[0] for entry in rivals):
            self.found = [entry for entry in self.found if not any(entry is rival for rival in rivals)]
            self.found.append((difference, crop, crop.cut(images)))


def _peaks(values: np.ndarray, side: int) -> list[tuple[float, int, int]]:
    """The squares with the largest means of (h, w) values, without overlaps: mean, y, x of each, best first."""
    stride = max(side // 2, 1)
    ys, xs = (np.arange(0, length - side + 1, stride) for length in values.shape)
    sums = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    down = sums[ys + side] - sums[ys]
    means = (down[:, xs + side] - down[:, xs]) / side**2
    found: list[tuple[float, int, int]] = []
    while len(found) < MAX_CROPS and means.max() > 0:
        i, j = np.unravel_index(means.argmax(), means.shape)
        found.append((float(means[i, j]), int(ys[i]), int(xs[j])))
        means[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] = 0
    return found


@dataclass(frozen=True)
class Line:
    """The row (of y = `at`) or the column (of x = `at`) of a temporal profile."""

    is_row: bool
    at: int

    @classmethod
    def of(cls, text: str | None, height: int, width: int) -> "Line":
        """From "row:Y" or "column:X"; None is the middle row. Raises `OptionsError` unless the frame has this line."""
        kind, _, number = (text or f"row:{height // 2}").partition(":")
        length = {"row": height, "column": width}.get(kind)
        if length is None or not number.isdecimal():
            raise OptionsError(f"got the profile {text!r}, expected row:Y or column:X")
        if int(number) >= length:
            raise OptionsError(
                f"got the profile {text}, but there are {length} {kind}s, counted from 0; choose one of them"
            )
        return cls(kind == "row", int(number))

    def __str__(self) -> str:
        return f"{'row' if self.is_row else 'column'} {self.at}"


class Profile:
    """One line of pixels over time, for every version; every k-th frame of long clips."""

    def __init__(self, line: Line, frame_count: int) -> None:
        self.line = line
        self.every = -(-frame_count // MAX_ROWS)
        self._lines: list[list[np.ndarray]] = []  # by frame, by version

    def add(self, frame: int, images: list[np.ndarray]) -> None:
        """Append the line of a frame: its versions, (h, w, 3) uint8 each."""
        if frame % self.every == 0:
            at = self.line.at
            self._lines.append([(image[at] if self.line.is_row else image[:, at]).copy() for image in images])

    def pictures(self) -> list[np.ndarray]:
        """For every version (frames, w, 3), time downwards; for a column (h, frames, 3), time to the right."""
        axis = 0 if self.line.is_row else 1
        return [np.stack(lines, axis) for lines in zip(*self._lines, strict=True)]
