"""Writes the shape of the pixels into a finished Matroska or WebM file.

FFmpeg's muxer takes it from a field of the stream that PyAV does not set. H.264 and HEVC say it themselves, other
codecs do not.
"""

import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from stablevsr.media.truncation import EBML, SEGMENT

_SEEK_HEAD, _SEEK, _SEEK_ID, _SEEK_POSITION = b"\x11\x4d\x9b\x74", b"\x4d\xbb", b"\x53\xab", b"\x53\xac"
_VOID, _CRC, _INFO = b"\xec", b"\xbf", b"\x15\x49\xa9\x66"
_TRACKS, _TRACK, _VIDEO = b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT = b"\x54\xb0", b"\x54\xba", b"\x54\xb2"
_HEAD = 1 << 20  # bytes that hold all up to the end of the tracks
_LONG_VOID = 9  # bytes: an identifier, a size of eight, no content


class _Element(NamedTuple):
    identifier: bytes
    content: bytes
    length: int = 1  # of its size, in bytes; more where it needs more

    def encoded(self) -> bytes:
        length, size = self.length, len(self.content)
        while size >= (1 << 7 * length) - 1:
            length += 1
        return self.identifier + (size | 1 << 7 * length).to_bytes(length) + self.content


def write_display_size(path: Path, width: int, height: int, aspect: Fraction) -> bool:
    """Say that the pixels of the first track of a file by FFmpeg are not square.

    The tracks grow into the space that FFmpeg leaves after its table of contents, so that all else stays in its place.

    Args:
        width, height: of the pictures in pixels.
        aspect: width over height of one pixel.

    Returns:
        Whether it worked: not for a file that does not begin as FFmpeg's do, which is left alone.
    """
    with path.open("r+b") as file:
        data = file.read(_HEAD)
        begin = _content_of_segment(data)
        elements, end = _elements(data, begin, last=_TRACKS)
        if [element.identifier for element in elements] != [_SEEK_HEAD, _VOID, _INFO, _TRACKS]:
            return False
        shown = {_DISPLAY_WIDTH: max(1, round(width * aspect)), _DISPLAY_HEIGHT: height, _DISPLAY_UNIT: 0}  # pixels
        seek_head, _, info, tracks = elements
        tracks = _with_numbers(tracks, [_TRACK, _VIDEO], shown)
        at_tracks = end - begin - len(tracks.encoded())
        at_info = at_tracks - len(info.encoded())
        seek_head = _with_positions(seek_head, {_INFO: at_info, _TRACKS: at_tracks})
        left = at_info - len(seek_head.encoded())
        if left < _LONG_VOID:
            return False
        void = _Element(_VOID, bytes(left - _LONG_VOID), _LONG_VOID - 1)
        file.seek(begin)
        file.write(b"".join(element.encoded() for element in (seek_head, void, info, tracks)))
    return True


def _content_of_segment(data: bytes) -> int:
    """Where the content of the segment begins; the end of the data if it is no Matroska file."""
    found, position = _elements(data, 0, last=EBML)
    if not found or data[position : position + 4] != SEGMENT:
        return len(data)
    return position + 4 + _length_at(data, position + 4)


def _elements(data: bytes, position: int = 0, last: bytes | None = None) -> tuple[list[_Element], int]:
    """The elements from a position up to the `last` one, or to the end of the data, and where that is."""
    found: list[_Element] = []
    while position < len(data) and not (found and found[-1].identifier == last):
        begin = position + _length_at(data, position)
        length = _length_at(data, begin)
        size = int.from_bytes(data[begin : begin + length]) & ((1 << 7 * length) - 1)
        end = begin + length + size
        if end > len(data):
            break
        found.append(_Element(data[position:begin], data[begin + length : end], length))
        position = end
    return found, position


def _length_at(data: bytes, position: int) -> int:
    """Of a variable-length integer, in bytes: given by its leading zero bits."""
    return 9 - data[position].bit_length() if position < len(data) else 1


def _joined(elements: list[_Element]) -> bytes:
    """The content of a parent; a checksum at its beginning is that of the others."""
    if elements and elements[0].identifier == _CRC:
        others = _joined(elements[1:])
        return _Element(_CRC, zlib.crc32(others).to_bytes(4, "little")).encoded() + others
    return b"".join(element.encoded() for element in elements)


def _with_numbers(element: _Element, path: list[bytes], numbers: dict[bytes, int]) -> _Element:
    """An element with numbers set in the first of its descendants along a path."""
    children, _ = _elements(element.content)
    if path:
        index = next(i for i, child in enumerate(children) if child.identifier == path[0])
        children[index] = _with_numbers(children[index], path[1:], numbers)
    else:
        children = [child for child in children if child.identifier not in numbers]
        children += [_Element(identifier, _number(value)) for identifier, value in numbers.items()]
    return element._replace(content=_joined(children))


def _with_positions(seek_head: _Element, starts: dict[bytes, int]) -> _Element:
    """The table of contents with other positions in it, in as many bytes as before."""
    children, _ = _elements(seek_head.content)
    for index, child in enumerate(children):
        entry = {each.identifier: each for each in _elements(child.content)[0]} if child.identifier == _SEEK else {}
        start = starts.get(entry[_SEEK_ID].content) if entry else None
        if start is not None:
            position = entry[_SEEK_POSITION]
            entry[_SEEK_POSITION] = position._replace(content=start.to_bytes(len(position.content)))
            children[index] = child._replace(content=_joined(list(entry.values())))
    return seek_head._replace(content=_joined(children))


def _number(value: int) -> bytes:
    return value.to_bytes(max(1, -(-value.bit_length() // 8)))
