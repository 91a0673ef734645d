"""Finds where to start decoding so that a frame in the middle of a video is identical to that of a full pass."""

from collections.abc import Iterable
from dataclasses import dataclass

import av

# Containers that store exact presentation times and seek to key frames.
_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Codecs with one frame per packet. In others some packets show nothing (VP8) or half a frame.
_CODECS = ("h264", "hevc", "vp9", "av1", "prores", "ffv1", "mjpeg", "dnxhd")
_REORDERED = 64  # packets by which frames may be out of order; no codec exceeds 16


@dataclass(frozen=True)
class Entry:
    """The key frames from which a frame can be decoded; times are presentation times of packets.

    keys: for the time of each key frame, how many frames are shown before it.
    wanted: time of the frame.
    """

    keys: dict[int, int]
    wanted: int

    @property
    def key(self) -> int:
        """The last key frame, from which the fewest frames have to be decoded."""
        return max(self.keys)


def can_seek(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether times and key frames of this container and codec are reliable."""
    return container.format.name in _FORMATS and stream.codec_context.codec.canonical_name in _CODECS


def entry_to(packets: Iterable[av.Packet], first: int) -> Entry | None:
    """Find the key frames before frame `first` (from 0) from the packets of a stream, reading no more than needed.

    None if there is none but the first frame, or the packets are ambiguous: one has no time or is not to be shown, or
    two share a time. Frame `first` itself does not count, because deinterlacing needs the frame before.
    """
    times: list[int] = []
    keys: set[int] = set()
    for packet in packets:
        if not packet.size:
            continue
        if packet.pts is None or packet.is_discard:
            return None
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.add(packet.pts)
        if len(times) > first + _REORDERED:
            break
    times.sort()
    if first < 1 or len(times) <= first or len(set(times)) < len(times):
        return None
    before = {key: number for number, key in enumerate(times[:first]) if number and key in keys}
    return Entry(before, times[first]) if before else None
