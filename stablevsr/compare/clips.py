"""The clips of a comparison, files or arrays, read side by side one frame at a time."""

import hashlib
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from stablevsr.config import SCALE
from stablevsr.errors import InputError, OptionsError
from stablevsr.media import Frame, PartReader, Reader, open_reader
from stablevsr.media.paths import IMAGE_SUFFIXES
from stablevsr.sampling.pictures import Clip, ClipKind, PictureFormat, as_tensor

Source = str | Path | Clip


class ArrayReader(Reader):
    """A clip in memory: (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1], numpy or torch.

    Raises `UserError` for anything else.
    """

    def __init__(self, name: str, frames: Clip, rate: Fraction) -> None:
        super().__init__(Path(name))
        kind = ClipKind.of(frames)
        self._frames_given, self._is_uint8 = as_tensor(frames), kind.format.dtype == torch.uint8
        self.frame_count = len(frames)
        self.height, self.width = kind.size
        self.frame_rate, self.time_base = rate, 1 / rate

    def _frames(self) -> Generator[Frame, None, None]:
        for frame in self._frames_given:
            frame = frame.detach().cpu()
            image = frame if self._is_uint8 else PictureFormat(torch.uint8).encode(frame[None].float())
            yield Frame(image.numpy())


@dataclass(frozen=True)
class Fingerprint:
    """Identifies an input."""

    size: int  # bytes
    sha256: str  # of the file; for a folder, of the output of `LC_ALL=C sha256sum *` for its images


@dataclass(frozen=True, eq=False)
class Side:
    """One clip of a comparison. `role` is LR, result or truth."""

    role: str
    label: str
    reader: Reader
    fingerprint: Fingerprint | None = None  # None for arrays

    def check_size(self, other: "Side", scale: int = 1) -> None:
        """Raise `InputError` unless `other` is `scale` times as large."""
        mine, theirs = self.reader, other.reader
        if (theirs.width, theirs.height) == (scale * mine.width, scale * mine.height):
            return
        if scale == 1:
            raise InputError(f"{_size(self)} and {_size(other)}; give clips of the same size")
        raise InputError(
            f"{_size(self)} and {_size(other)}, expected {scale * mine.width}x{scale * mine.height}; "
            f"give results {scale} times as large as LR"
        )


@dataclass(frozen=True)
class Sides:
    """The clips of a comparison, all of the same length; results and truth are of the same size.

    low_res: the clip that was upscaled, or None if it is not known.
    """

    low_res: Side | None
    results: list[Side]
    truth: Side | None
    frame_count: int

    @property
    def all(self) -> list[Side]:
        """Every clip: LR, results, truth."""
        return [side for side in (self.low_res, *self.results, self.truth) if side]

    def frames(self) -> Iterator[list[np.ndarray]]:
        """Yields for each frame its picture in each of `all`, (h, w, 3) uint8; `InputError` when one ends too early."""
        with ExitStack() as stack:
            passes = [stack.enter_context(closing(iter(side.reader))) for side in self.all]
            for frames in zip_longest(*passes):
                if any(frame is None for frame in frames):
                    _check_counts(self.all, [sum(1 for _ in side.reader) for side in self.all])
                yield [eight_bits(frame.image) for frame in frames]


def gather(
    stack: ExitStack,
    low_res: Source | None,
    results: dict[str, Source],
    truth: Source | None,
    part: tuple[int, int | None] = (0, None),
    rate: Fraction = Fraction(25),
    allow_truncated: bool = False,
    allow_hdr: bool = False,
) -> Sides:
    """Open all clips and check that they match.

    Args:
        stack: closes the readers.
        part: first frame and last + 1, to take from LR, the truth and the results; a result of exactly this length is
            taken whole, as it was made from this part.
        rate: frames per second of arrays.
        allow_truncated, allow_hdr: of videos, see `media.open_reader`.

    Raises:
        InputError: for clips that cannot be read, or differ in size or length, naming them.
    """
    if not results:
        raise OptionsError("got nothing to compare, expected at least one result; name one")

    def side(role: str, label: str, source: Source) -> Side:
        if isinstance(source, str | Path):
            reader = stack.enter_context(open_reader(source, allow_truncated, allow_hdr))
            return Side(role, label, reader, fingerprint(Path(source)))
        return Side(role, label, stack.enter_context(ArrayReader(label, source, rate)))

    lr = None if low_res is None else side("LR", "LR", low_res)
    gt = None if truth is None else side("truth", "truth", truth)
    made = [side("result", label, source) for label, source in results.items()]
    for one in [*made[1:], *([gt] if gt else [])]:
        made[0].check_size(one)
    if lr:
        lr.check_size(made[0], SCALE)
    if part != (0, None):
        lr, made, gt = _cut(stack, part, lr, made, gt)
    sides = Sides(lr, made, gt, 0)
    return replace(sides, frame_count=_common_count(sides.all))


def _cut(
    stack: ExitStack, part: tuple[int, int | None], lr: Side | None, made: list[Side], gt: Side | None
) -> tuple[Side | None, list[Side], Side | None]:
    """The sides, cut to the part."""

    def cut(side: Side) -> Side:
        return replace(side, reader=stack.enter_context(PartReader(side.reader, *part)))

    longest = max(_count(side) for side in (lr, gt, *made) if side)
    length = min(longest, part[1] or longest) - part[0]
    return lr and cut(lr), [side if _count(side) == length else cut(side) for side in made], gt and cut(gt)


def _common_count(sides: list[Side]) -> int:
    """The common number of frames; frames are counted only if the files' claims differ."""
    counts = [_count(side) for side in sides]
    if len(set(counts)) > 1:
        counts = [sum(1 for _ in side.reader) for side in sides]
        _check_counts(sides, counts)
    return counts[0]


def _count(side: Side) -> int:
    return side.reader.frame_count or sum(1 for _ in side.reader)


def _check_counts(sides: list[Side], counts: list[int]) -> None:
    for side, count in zip(sides, counts, strict=True):
        if count != counts[0]:
            raise InputError(
                f"{sides[0].reader.path} has {counts[0]} frames and {side.reader.path} has {count}; give clips of "
                "the same length, or choose a part with --frames"
            )


def _size(side: Side) -> str:
    return f"{side.reader.path} is {side.reader.width}x{side.reader.height}"


def fingerprint(path: Path) -> Fingerprint:
    """Size and hash of a file, or of the images of a folder."""
    if not path.is_dir():
        return Fingerprint(path.stat().st_size, _sha256(path))
    files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
    files.sort(key=lambda file: os.fsencode(file.name))
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    digest = hashlib.sha256(os.fsencode(lines)).hexdigest()
    return Fingerprint(sum(file.stat().st_size for file in files), digest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def labels(paths: list[Path]) -> list[str]:
    """A unique name for each path: its file name, or if that is not unique the whole path, or one with a number."""
    names = [path.name or str(path) for path in paths]
    full = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [
        name if full[:i].count(name) == 0 else f"{name} ({full[:i].count(name) + 1})" for i, name in enumerate(full)
    ]


def eight_bits(image: np.ndarray) -> np.ndarray:
    """A picture with 16 bits per channel converted to 8, for the page."""
    return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
