"""The finished pictures of a unit: a lossless video (FFV1 in RGB), and beside it a record of how it was made."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from stablevsr.atomic import remove, replacing
from stablevsr.engine.array_file import using
from stablevsr.engine.plan import LOSSLESS, PER_FRAME, Output
from stablevsr.errors import UserError
from stablevsr.media.codecs import CODECS
from stablevsr.media.colour import Colours, to_rgb
from stablevsr.media.picture_file import PictureFile, PictureFormat

RATE = Fraction(25)  # of no meaning: frames are counted


@dataclass(frozen=True)
class Record:
    """How a piece was made. A piece without a record is not finished."""

    frames: int
    digest: str  # of the piece
    machine: str = ""
    gpu: str | None = None
    seconds: float = 0.0  # from the order to the piece
    sampling: float = 0.0  # of these, in the networks
    failures: int = 0  # attempts that failed before
    notices: list[str] = field(default_factory=list)


def write_piece(path: Path, pictures: Iterable[Tensor], is_deep: bool) -> str:
    """Write pictures, (4h, 4w, 3) uint8 or uint16 each, to `path`, atomically; returns its digest.

    Raises:
        ResourceError: when the disk fails or is full.
    """
    file: PictureFile | None = None
    with using(path), replacing(path) as part:
        try:
            for picture in pictures:
                if file is None:
                    file = PictureFile(part, _format(picture.shape[0], picture.shape[1], is_deep))
                file.write(picture.numpy(), file.count, 1)
            assert file is not None  # a unit has frames
            file.finish()
        finally:
            if file is not None:
                file.close()
        return digest_of(part)


def digest_of(path: Path) -> str:
    """A digest of a piece: a damaged one decodes without an error."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_piece(path: Path, record: Record, is_deep: bool) -> Iterator[Tensor]:
    """The pictures of a piece, (4h, 4w, 3) uint8 or uint16 each.

    Raises:
        UserError: when it is damaged.
    """
    found = 0
    try:
        if digest_of(path) != record.digest:
            raise _damaged(path)
        with av.open(str(path)) as file:
            for frame in file.decode(video=0):
                found += 1
                yield torch.from_numpy(np.ascontiguousarray(to_rgb(frame, is_deep)))
    except (av.FFmpegError, OSError) as error:
        raise _damaged(path) from error
    if found != record.frames:
        raise _damaged(path)


def bound(folder: Path, height: int, width: int, is_deep: bool) -> Output:
    """An upper bound on the disk space of a piece of pictures of that size."""
    return Output(folder, int((2 if is_deep else 1) * LOSSLESS * height * width) + PER_FRAME)


def write_record(piece: Path, record: Record) -> None:
    """Declare a piece finished, atomically."""
    path = _record_path(piece)
    with using(path), replacing(path) as part:
        part.write_text(json.dumps(asdict(record)))


def read_record(piece: Path) -> Record | None:
    """The record of a piece; None if it is not finished."""
    path = _record_path(piece)
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        raise _damaged(piece) from error


def remove_piece(piece: Path) -> None:
    """Delete a piece and its record, if they exist."""
    for path in (_record_path(piece), piece):  # in this order: without a record it is not finished
        with using(path):
            remove(path)


def _record_path(piece: Path) -> Path:
    return piece.with_suffix(".json")


def _format(height: int, width: int, is_deep: bool) -> PictureFormat:
    codec = CODECS["ffv1"].for_source(is_deep)
    return PictureFormat("matroska", codec, codec.options, height, width, RATE, 1 / RATE, Fraction(1), Colours())


def _damaged(piece: Path) -> UserError:
    return UserError(
        f"{piece}, a finished scene, is damaged: delete it and {_record_path(piece).name} to make it again"
    )
