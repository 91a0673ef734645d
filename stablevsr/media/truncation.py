"""Whether a video file ends before its container says so: FFmpeg plays what is there and does not mind."""

import os
from pathlib import Path
from typing import BinaryIO

BOXES = b"ftyp styp moov moof mfra mdat free skip wide uuid meta sidx ssix pdin prft emsg".split()
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """How many bytes are missing at the end of an MP4, MOV, Matroska, WebM or AVI file; 0 for what cannot be known."""
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


def _end_of_boxes(file: BinaryIO, length: int) -> int:
    """ISO base media: boxes of size, type, content, one behind the other."""
    position = 0
    while position + 8 <= length:
        file.seek(position)
        size, kind = int.from_bytes(file.read(4)), file.read(4)
        if kind not in BOXES:  # something else was appended
            break
        if size == 1:
            size = int.from_bytes(file.read(8))
        if size < 8:  # 0: to the end of the file
            break
        position += size
    return position


def _end_of_segment(file: BinaryIO) -> int:
    """EBML: a header element, then the segment that holds everything else."""
    file.seek(4)
    file.seek(_vint(file) or 0, os.SEEK_CUR)
    if file.read(4) != SEGMENT:
        return 0
    size = _vint(file)
    return 0 if size is None else file.tell() + size


def _vint(file: BinaryIO) -> int | None:
    """A number whose leading zero bits tell its length; None when it is all ones, which means unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + file.read(more)) & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value


def _end_of_riff(file: BinaryIO, length: int) -> int:
    """RIFF chunks; files above 1 GB have several."""
    position = 0
    while position + 8 <= length:
        file.seek(position)
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
        if kind != b"RIFF" or size == 0:  # 0: never finished
            break
        position += 8 + size + size % 2
    return position
