"""Reads animated WebP and PNG files, with Pillow because FFmpeg does not decode animated WebP."""

import warnings
from collections.abc import Generator, Iterator
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from stablevsr.errors import InputError
from stablevsr.media.frame import Frame, Reader

ANIMATED_SUFFIXES = (".webp", ".png")
_MILLISECOND = Fraction(1, 1000)
_TICKS = Fraction(1, 90)  # of a millisecond
_UNSAID = 100  # milliseconds for which browsers show a frame without a duration
_BACKGROUND = 255  # behind transparent pixels, as FFmpeg does for GIF


def is_animated(path: Path) -> bool:
    """Whether an image file is animated; False if it cannot be read, which opening it will report."""
    if path.suffix.lower() not in ANIMATED_SUFFIXES:
        return False
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # the decoders raise many types for damaged files
        return False


class AnimationReader(Reader):
    """The frames of an animation with their durations, on white where they are transparent.

    Opening decodes every frame once to learn the durations. Raises InputError when one cannot be decoded.
    """

    time_base = _MILLISECOND * _TICKS

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        durations, transparent = [], False
        for image in self._pictures():
            durations.append(Fraction(image.info.get("duration") or _UNSAID))
            transparent = transparent or int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255
            self.height, self.width = image.height, image.width
        self._ends = [round(end / _TICKS) for end in accumulate(durations)]
        self.frame_count = len(durations)
        self.frame_rate = (self.frame_count / (sum(durations) * _MILLISECOND)).limit_denominator(1001)
        if transparent:
            self.notices.append(f"{path}: the transparency of an animation is dropped")

    def frame_times(self) -> Iterator[Fraction]:
        """When the frames are shown, in seconds."""
        return iter([start * self.time_base for start in (0, *self._ends[:-1])])

    def _frames(self) -> Generator[Frame, None, None]:
        starts = (0, *self._ends[:-1])
        for image, start, end in zip(self._pictures(), starts, self._ends, strict=True):
            yield Frame(_flat(image), pts=start, time_base=self.time_base, duration=end - start)

    def _pictures(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.path) as image:
                for number in range(getattr(image, "n_frames", 1)):
                    image.seek(number)
                    image.load()
                    yield image
        except Exception as error:  # as above
            raise InputError(
                f"{self.path} is an animation that cannot be decoded; repair it or convert it to a video first"
            ) from error


def _flat(image: Image.Image) -> np.ndarray:
    """Blend with the background: (h, w, 3) uint8."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.uint32)
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    return ((colours * alpha + _BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)
