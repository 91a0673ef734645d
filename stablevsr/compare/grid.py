"""All versions of a frame stitched into one picture, and one H.264 stream of them: versions cannot lose sync."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np

from stablevsr.errors import ResourceError
from stablevsr.media.codecs import x264_params
from stablevsr.media.colour import TAGS, to_frame

GUARD = 8  # pixels of replicated border around each tile, so that chroma and deblocking do not bleed
BLOCK = 16  # side of an H.264 macroblock, to which tiles are aligned
MAX_HARDWARE_SIDE = 4096  # for hardware decoders
MAX_SIDE = 8192  # for browsers
GROUP = 12  # frames from key frame to key frame: the most that one step backward has to decode


@dataclass(frozen=True)
class Grid:
    """The layout of the stitched picture, in pixels.

    count: number of tiles, row by row. height, width: of a tile. shrink: factor by which versions are downscaled.
    """

    count: int
    columns: int
    height: int
    width: int
    shrink: int = 1

    @classmethod
    def of(cls, count: int, height: int, width: int) -> "Grid":
        """The squarest grid for `count` versions of (height, width), downscaled if they would not fit."""
        shrink = 1
        while True:
            small = -(-height // shrink), -(-width // shrink)
            grids = [cls(count, columns, *small, shrink) for columns in range(1, count + 1)]
            for limit in (MAX_HARDWARE_SIDE, MAX_SIDE):
                fitting = [grid for grid in grids if max(grid.size) <= limit]
                if fitting:
                    return min(fitting, key=lambda grid: (max(grid.size), math.prod(grid.size)))
            shrink += 1

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a tile with its border."""
        height, width = (-(-(side + 2 * GUARD) // BLOCK) * BLOCK for side in (self.height, self.width))
        return height, width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the stitched picture."""
        return -(-self.count // self.columns) * self.cell[0], self.columns * self.cell[1]

    def corner(self, tile: int) -> tuple[int, int]:
        """x and y of the top left pixel of a version."""
        row, column = divmod(tile, self.columns)
        return column * self.cell[1] + GUARD, row * self.cell[0] + GUARD

    def stitch(self, images: list[np.ndarray]) -> np.ndarray:
        """Stitch the versions of a frame, (h, w, 3) uint8 each, into one picture."""
        stitched = np.zeros((*self.size, 3), np.uint8)
        rest = self.cell[0] - self.height - GUARD, self.cell[1] - self.width - GUARD
        for tile, image in enumerate(images):
            x, y = self.corner(tile)
            padded = np.pad(reduced(image, self.shrink), ((GUARD, rest[0]), (GUARD, rest[1]), (0, 0)), mode="edge")
            stitched[y - GUARD : y - GUARD + self.cell[0], x - GUARD : x - GUARD + self.cell[1]] = padded
        return stitched


def reduced(image: np.ndarray, factor: int) -> np.ndarray:
    """(h, w, 3) uint8 to (ceil(h / factor), ceil(w / factor), 3), by averaging squares."""
    if factor == 1:
        return image
    height, width = (-(-side // factor) for side in image.shape[:2])
    missing = height * factor - image.shape[0], width * factor - image.shape[1]
    padded = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    means = padded.reshape(height, factor, width, factor, 3).mean((1, 3), dtype=np.float32)
    return means.round().astype(np.uint8)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Raises `ResourceError` for a file that cannot be written."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise ResourceError(
            f"the page could not be written to {path.parent} ({error.strerror or error}); choose another output"
        ) from error


class GridVideo:
    """An MP4 of stitched pictures at a constant rate: frame i is shown from i / rate to (i + 1) / rate.

    Without B-frames and with a key frame every twelve frames, so that a browser seeks quickly and exactly.

    Raises `ResourceError` when the file cannot be written.
    """

    def __init__(self, path: Path, grid: Grid, rate: Fraction, crf: int) -> None:
        self._grid, self._count = grid, 0
        options = {"preset": "veryfast", "crf": str(crf)} | x264_params("scenecut=0")
        self._path = path
        with reporting(path):
            self._container = av.open(str(path), "w", format="mp4", container_options={"movflags": "+faststart"})
            height, width = grid.size
            self._stream = self._container.add_stream("libx264", rate=rate, options=options, height=height, width=width)
            context = self._stream.codec_context
            context.pix_fmt, context.gop_size, context.max_b_frames = "yuv420p", GROUP, 0
            context.time_base = self._time_base = 1 / rate
            for name, value in TAGS.items():
                setattr(context, name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            with reporting(self._path):
                self._container.mux(self._stream.encode(None))
                self._container.close()
        else:
            with suppress(OSError, av.FFmpegError):  # the file is about to be deleted
                self._container.close()

    def write(self, images: list[np.ndarray]) -> None:
        """Append a frame: its versions, (h, w, 3) uint8 each."""
        picture = to_frame(self._grid.stitch(images), "yuv420p")
        picture.pts, picture.time_base = self._count, self._time_base
        self._count += 1
        with reporting(self._path):
            self._container.mux(self._stream.encode(picture))
