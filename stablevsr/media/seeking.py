"""Where to begin decoding so that a frame in the middle of a video comes out as it would from the start."""

from collections.abc import Iterable
from dataclasses import dataclass

import av

# Of containers that store when each frame is shown, and whose index leads to a key frame.
_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Of these a packet is a frame. Elsewhere some packets show nothing (VP8), or half a frame.
_CODECS = ("h264", "hevc", "vp9", "av1", "prores", "ffv1", "mjpeg", "dnxhd")
_REORDERED = 64  # packets by which a frame may come before its place in the file; no codec takes more than 16


@dataclass(frozen=True)
class Entry:
    """Where a frame can be reached from; times are those of the packets.

    keys: time of each key frame before it, and how many frames are shown before that one.
    wanted: time of the frame.
    """

    keys: dict[int, int]
    wanted: int

    @property
    def key(self) -> int:
        """The last key frame, the best one to begin at."""
        return max(self.keys)


def can_seek(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether container and codec are of a kind whose times can be relied on."""
    return container.format.name in _FORMATS and stream.codec_context.codec.canonical_name in _CODECS


def entry_to(packets: Iterable[av.Packet], first: int) -> Entry | None:
    """The key frames before frame `first` (from 0), from the packets of the whole stream; no more than needed.

    None where the first key frame is that one, or the packets leave a doubt: one without a time or not to be shown, or
    two at one time. The key frame is not `first` itself, because deinterlacing looks at the frame before.
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
