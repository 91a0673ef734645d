"""Reads a folder of images, or one image, as a clip."""

import re
from collections import Counter
from collections.abc import Generator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from stablevsr.errors import UserError
from stablevsr.media.alpha import split_alpha
from stablevsr.media.frame import Frame, Reader
from stablevsr.media.paths import IMAGE_SUFFIXES, natural_key
from stablevsr.media.still import StillHeader, read_header, read_with_profile

STILL_RATE = Fraction(25)  # images have no rate; FFmpeg assumes 25 as well


class FolderReader(Reader):
    """The images of a folder in natural order of their names, or a single image file, at 25 frames per second.

    Hidden files are ignored; subfolders and files without an image suffix are skipped with a notice. Raises UserError
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
                self.notices.append(f"{file.name} holds several pictures, only the first is read.")

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
            raise UserError(f"Folder {self.path} cannot be read ({error.strerror}); check its permissions.") from error
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
            raise UserError(f"Folder {self.path} holds no image; put files ending in {' '.join(IMAGE_SUFFIXES)} there.")
        return files

    def _check_sizes(self) -> None:
        first, expected = self._stills[0]
        for file, header in self._stills:
            if (header.height, header.width) != (expected.height, expected.width):
                raise _size_error(file, header.height, header.width, first, expected)


def _size_error(file: Path, height: int, width: int, first: Path, expected: StillHeader) -> UserError:
    return UserError(
        f"{file} is {width}x{height} but {first} is {expected.width}x{expected.height}; "
        "all images of a folder must have one size."
    )


def _gaps(stems: list[str]) -> list[str]:
    """Messages about gaps in numbered names, as in f1, f2, f5."""
    found = []
    numbered = [re.fullmatch(r"(.*?)(\d+)(\D*)", stem) for stem in stems]
    for before, after in pairwise(numbered):
        if before and after and before.group(1, 3) == after.group(1, 3):
            missing = int(after[2]) - int(before[2]) - 1
            if missing > 0:
                found.append(f"the numbers jump from {before[0]} to {after[0]}; {missing} frames may be missing.")
    return found[:3] if len(found) <= 3 else [*found[:2], f"and {len(found) - 2} more jumps in the numbers."]


def _output_names(files: list[Path]) -> list[str]:
    """Stems, or full names if two files share a stem (a.jpg and a.png), so that no output overwrites another."""
    counts = Counter(file.stem.casefold() for file in files)
    return [file.stem if counts[file.stem.casefold()] == 1 else file.name for file in files]
