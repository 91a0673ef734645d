"""Detects truncated and damaged video files, which FFmpeg plays as far as it can without an error."""

import os
import re
from pathlib import Path
from typing import BinaryIO

BOXES = b"ftyp styp moov moof mfra mdat free skip wide uuid meta sidx ssix pdin prft emsg".split()
_IN_MOVI = re.compile(rb"\d\d[a-z]{2}|ix\d\d|idx1|JUNK|LIST")  # chunks among the pictures of an AVI file
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """Bytes missing at the end of an MP4, MOV, Matroska, WebM or AVI file; 0 if that cannot be known."""
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        if start[4:8] in BOXES:
            end = _end_of_boxes(file, length)
        elif start[:4] == EBML:
            end = _end_of_segment(file)
        elif start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            end = _end_of_riff(file, length)
        else:
            return 0
    return max(0, end - length)


def damaged_at(path: Path) -> int | None:
    """The byte at which the chain of chunks of an AVI file breaks; None if it does not, and for other containers.

    FFmpeg skips to the next valid chunk, so that frames get lost silently.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        if start[:4] != b"RIFF" or start[8:12] != b"AVI ":
            return None
        return _broken_chunk(file, length)


def _broken_chunk(file: BinaryIO, length: int) -> int | None:
    position, end = 0, 0  # of the RIFF chunk; files over 1 GB have several
    while position + 8 <= length:
        file.seek(position)
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
        if position >= end:
            if kind != b"RIFF" or size == 0:  # appended data, or never finalized
                return None
            end = min(length, position + 8 + size)
        if kind in (b"RIFF", b"LIST"):
            position += 12  # to the content
        elif not (kind.isascii() and kind.decode("ascii").isprintable()):
            file.seek(position)
            return None if _only_zeros(file) else position  # preallocated space
        elif position + 8 + size > end:
            return position
        else:
            position = _next_chunk(file, position + 8 + size)
    return None


def _next_chunk(file: BinaryIO, end: int) -> int:
    """Start of the chunk after one with this end: at an even byte, though some programs do not pad."""
    if end % 2 == 0:
        return end
    file.seek(end)
    names = file.read(5)
    return end if _IN_MOVI.match(names) and not _IN_MOVI.match(names[1:]) else end + 1


def _only_zeros(file: BinaryIO) -> bool:
    return not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))


def _end_of_boxes(file: BinaryIO, length: int) -> int:
    """ISO base media: a sequence of boxes of size, type and content."""
    position = 0
    while position + 8 <= length:
        file.seek(position)
        size, kind = int.from_bytes(file.read(4)), file.read(4)
        if kind not in BOXES:  # appended data
            break
        if size == 1:
            size = int.from_bytes(file.read(8))
        if size < 8:  # 0: to the end of the file
            break
        position += size
    return position


def _end_of_segment(file: BinaryIO) -> int:
    """EBML: a header element, then the segment with everything else."""
    file.seek(4)
    file.seek(_vint(file) or 0, os.SEEK_CUR)
    if file.read(4) != SEGMENT:
        return 0
    size = _vint(file)
    return 0 if size is None else file.tell() + size


def _vint(file: BinaryIO) -> int | None:
    """A variable-length integer, its length given by its leading zero bits; None for all ones, which means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + file.read(more)) & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value


def _end_of_riff(file: BinaryIO, length: int) -> int:
    """RIFF chunks; files over 1 GB have several."""
    position = 0
    while position + 8 <= length:
        file.seek(position)
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
        if kind != b"RIFF" or size == 0:  # 0: never finalized
            break
        position += 8 + size + size % 2
    return position
