"""Reads a folder of images, or one image, as a clip: headers first, pixels frame by frame."""

import io
import re
import struct
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import imageio.v3 as iio
import numpy as np

from stablevsr.errors import InputError
from stablevsr.media.alpha import split_alpha
from stablevsr.media.display import Orientation
from stablevsr.media.frame import Frame, Reader
from stablevsr.media.paths import IMAGE_SUFFIXES, natural_key
from stablevsr.media.profiles import is_gray, read_profile, to_srgb

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PIXELS = 178_956_970  # Pillow's limit
_MODES_8 = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's names of the supported pixel types
_MODES_16 = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class StillHeader:
    """What is known of an image before its pixels are decoded.

    height, width: size of the upright picture.
    alpha: whether there is an alpha channel or a transparent color.
    pages: pictures in the file, of which the first is read.
    deep: FFmpeg's demuxer for samples of 16 bits (Pillow reduces 16-bit color to 8), else None.
    """

    height: int
    width: int
    orientation: Orientation
    alpha: bool
    deep: str | None
    pages: int


def read_header(path: Path) -> StillHeader:
    """Read the header of an image file; cheap. Raises InputError if it is damaged or of another pixel type."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            header = _png_header(path, file) if magic == _PNG_SIGNATURE else None
        if header is None:
            header = _pillow_header(path, tiff=magic.startswith(_TIFF_MAGIC))
    except InputError:
        raise
    except Exception as error:  # decoders raise many types for damaged files
        raise _unreadable(path) from error
    if header.height * header.width > MAX_PIXELS:
        raise InputError(
            f"{path} is {header.width}x{header.height}, but at most {MAX_PIXELS} pixels can be read; "
            "cut it into parts first"
        )
    return header


def read_image(path: Path, header: StillHeader) -> np.ndarray:
    """Decode an image file to upright (h, w, 3) RGB or, with alpha, (h, w, 4): uint16 if it is deep, else uint8.

    Raises InputError if it is damaged.
    """
    try:
        if header.deep:
            image = _read_deep(path, header.deep, "rgba64le" if header.alpha else "rgb48le")
        else:
            image = iio.imread(path, plugin="pillow", mode="RGBA" if header.alpha else "RGB", index=0)
    except Exception as error:  # as above
        raise _unreadable(path) from error
    return np.ascontiguousarray(header.orientation.apply(image))


def read_with_profile(path: Path, header: StillHeader) -> tuple[np.ndarray, bytes | None]:
    """Like `read_image`, and the ICC profile; gray images with a profile are converted to sRGB instead."""
    image = read_image(path, header)
    try:
        profile = read_profile(path)
    except Exception as error:  # as above
        raise _unreadable(path) from error
    if profile is None or not is_gray(profile):
        return image, profile
    image[..., :3] = to_srgb(image[..., :3], profile)
    return image, None


def _png_header(path: Path, file: BinaryIO) -> StillHeader:
    # Pillow decodes all pixels of a PNG to read its EXIF data, too slow for a long folder, while chunks are simple.
    # Walking to the last one also detects truncated files.
    width, height, depth, colour = struct.unpack(">8xIIBB7x", file.read(25))
    names = set()
    while b"IEND" not in names:
        length, name = struct.unpack(">I4s", file.read(8))
        names.add(name)
        file.seek(length + 4, io.SEEK_CUR)
    orientation = Orientation()
    if b"eXIf" in names:
        orientation = _exif_orientation(iio.immeta(path, plugin="pillow", index=0, exclude_applied=False))
    alpha = colour in (4, 6) or b"tRNS" in names
    pages = 2 if b"acTL" in names else 1  # animated; the number does not matter
    return _header(height, width, orientation, alpha, "png_pipe" if depth == 16 else None, pages)


def _pillow_header(path: Path, tiff: bool) -> StillHeader:
    with iio.imopen(path, "r", plugin="pillow") as image:
        height, width = image.properties(index=0).shape[:2]
        pages = image.properties(index=...).n_images or 1  # type: ignore[arg-type]  # imageio's word for all pages
        metadata = image.metadata(index=0, exclude_applied=False)
    mode = metadata["mode"]
    if mode not in _MODES_8 + _MODES_16:
        raise InputError(
            f"{path} has pixels of type {mode}, but only RGB, gray and palette images can be read; convert it to RGB"
        )
    alpha = "A" in mode or "transparency" in metadata
    orientation = _exif_orientation(metadata)
    if not tiff:
        return _header(height, width, orientation, alpha, None, pages)
    # Pillow turns TIFFs upright itself, and reports that size; FFmpeg, used for 16 bits, does not.
    if 16 in np.atleast_1d(metadata.get("BitsPerSample", 1)):
        return StillHeader(height, width, orientation, alpha, "tiff_pipe", pages)
    return StillHeader(height, width, Orientation(), alpha, None, pages)


def _header(
    height: int, width: int, orientation: Orientation, alpha: bool, deep: str | None, pages: int
) -> StillHeader:
    """Build a header from the stored size."""
    if orientation.transpose:
        height, width = width, height
    return StillHeader(height, width, orientation, alpha, deep, pages)


def _exif_orientation(metadata: dict) -> Orientation:
    return Orientation.from_exif(metadata.get("Orientation"))


def _read_deep(path: Path, demuxer: str, pix_fmt: str) -> np.ndarray:
    # From memory, because FFmpeg would read "%d" in the name as a pattern.
    with av.open(io.BytesIO(path.read_bytes()), "r", format=demuxer) as container:
        return next(container.decode(video=0)).to_ndarray(format=pix_fmt)


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path} is named like an image but cannot be decoded as one; replace or remove it")


STILL_RATE = Fraction(25)  # images have no rate; FFmpeg assumes 25 as well


class FolderReader(Reader):
    """The images of a folder in natural order of their names, or a single image file, at 25 frames per second.

    Hidden files are ignored; subfolders and files without an image suffix are skipped with a notice. Raises InputError
    if there is no image, an image cannot be read, or two images differ in size.
    """

    frame_rate = STILL_RATE
    time_base = 1 / STILL_RATE

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        files = self._list() if path.is_dir() else [path]
        self._stills = [(file, read_header(file)) for file in files]
        self._check_sizes()
        self._names = _output_names(files)
        self.height, self.width = self._stills[0][1].height, self._stills[0][1].width
        self.frame_count = len(files)
        self.notices += [f"{path}: {gap}" for gap in _gaps([file.stem for file in files])]
        self.is_deep = any(header.deep for _, header in self._stills)
        self.has_alpha = any(header.alpha for _, header in self._stills)
        for file, header in self._stills:
            if header.pages > 1:
                self.notices.append(f"{file.name} holds several pictures, only the first is read")

    def _frames(self) -> Generator[Frame, None, None]:
        return self._frames_from(0)

    def _frames_from(self, first: int) -> Generator[Frame, None, None]:
        for (file, header), name in zip(self._stills[first:], self._names[first:], strict=True):
            image, profile = read_with_profile(file, header)
            if image.shape[:2] != (self.height, self.width):  # changed after the folder was opened
                raise _size_error(file, image.shape[0], image.shape[1], *self._stills[0])
            if self.is_deep and not header.deep:
                image = image.astype(np.uint16) * 257
            colours, alpha = split_alpha(image)
            yield Frame(colours, name=name, alpha=alpha, profile=profile)

    def _list(self) -> list[Path]:
        try:
            entries = sorted(self.path.iterdir(), key=lambda entry: natural_key(entry.name))
        except OSError as error:
            raise InputError(f"folder {self.path} cannot be read ({error.strerror}); check its permissions") from error
        files = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                self.notices.append(f"skipped {entry.name}: a folder")
            elif entry.suffix.lower() not in IMAGE_SUFFIXES:
                self.notices.append(f"skipped {entry.name}: not an image")
            else:
                files.append(entry)
        if not files:
            raise InputError(f"folder {self.path} holds no image; put files ending in {' '.join(IMAGE_SUFFIXES)} there")
        return files

    def _check_sizes(self) -> None:
        first, expected = self._stills[0]
        for file, header in self._stills:
            if (header.height, header.width) != (expected.height, expected.width):
                raise _size_error(file, header.height, header.width, first, expected)


def _size_error(file: Path, height: int, width: int, first: Path, expected: StillHeader) -> InputError:
    return InputError(
        f"{file} is {width}x{height} but {first} is {expected.width}x{expected.height}; "
        "all images of a folder must have one size"
    )


def _gaps(stems: list[str]) -> list[str]:
    """Messages about gaps in numbered names, as in f1, f2, f5."""
    found = []
    numbered = [re.fullmatch(r"(.*?)(\d+)(\D*)", stem) for stem in stems]
    for before, after in pairwise(numbered):
        if before and after and before.group(1, 3) == after.group(1, 3):
            missing = int(after[2]) - int(before[2]) - 1
            if missing > 0:
                found.append(f"the numbers jump from {before[0]} to {after[0]}; {missing} frames may be missing")
    return found[:3] if len(found) <= 3 else [*found[:2], f"and {len(found) - 2} more jumps in the numbers"]


def _output_names(files: list[Path]) -> list[str]:
    """Stems, or full names if two files share a stem (a.jpg and a.png), so that no output overwrites another."""
    counts = Counter(file.stem.casefold() for file in files)
    return [file.stem if counts[file.stem.casefold()] == 1 else file.name for file in files]
