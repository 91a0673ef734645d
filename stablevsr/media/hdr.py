"""Static metadata of HDR video: the screen it was graded on, and how bright it gets."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Self, cast

import av
from av.buffer import Buffer
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorTrc

TRANSFERS = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
_DYNAMIC = (SideData.DYNAMIC_HDR_PLUS, SideData.DOVI_METADATA, SideData.DOVI_RPU_BUFFER)
_DISPLAY = struct.Struct("=20i2i")  # AVMasteringDisplayMetadata: 10 fractions, and which of them are there
_LIGHT = struct.Struct("=2I")  # AVContentLightMetadata


@dataclass(frozen=True)
class Mastering:
    """As SMPTE ST 2086 and CTA-861.3 have it; None for what a file does not say.

    display: x and y of red, green, blue and white, then the least and the greatest luminance in cd/m2.
    light: of the brightest pixel and of the brightest frame on average, in cd/m2.
    """

    display: tuple[Fraction, ...] | None = None
    light: tuple[int, int] | None = None

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Self | None:
        """What comes with a decoded frame; None where nothing does."""
        display, light = None, None
        found = frame_data(frame, SideData.MASTERING_DISPLAY_METADATA)
        if found:
            *parts, has_primaries, has_luminance = _DISPLAY.unpack_from(found)
            if has_primaries and has_luminance:
                display = tuple(Fraction(n, d or 1) for n, d in zip(parts[::2], parts[1::2], strict=True))
        found = frame_data(frame, SideData.CONTENT_LIGHT_LEVEL)
        if found:
            light = _LIGHT.unpack_from(found)
        return cls(display, light) if display or light else None

    def x265_params(self) -> list[str]:
        """Settings for the one encoder here that writes it."""
        found = []
        if self.display:
            *points, darkest, brightest = self.display
            red, green, blue, white = zip(points[::2], points[1::2], strict=True)
            names = (("G", green), ("B", blue), ("R", red), ("WP", white))
            screen = "".join(f"{name}({round(x * 50000)},{round(y * 50000)})" for name, (x, y) in names)
            found.append(f"master-display={screen}L({round(brightest * 10000)},{round(darkest * 10000)})")
        if self.light:
            found.append(f"max-cll={self.light[0]},{self.light[1]}")
        return found


def has_dynamic_metadata(frame: av.VideoFrame) -> bool:
    """Whether a frame comes with metadata for itself alone: HDR10+ or Dolby Vision."""
    return any(frame_data(frame, kind) for kind in _DYNAMIC)


def frame_data(frame: av.VideoFrame, kind: SideData) -> bytes:
    """Data of that kind that comes with a decoded frame; b"" where there is none."""
    found = cast("Mapping[SideData, Buffer]", frame.side_data)  # which PyAV's stubs call a dict with other keys
    data = found.get(kind)
    return b"" if data is None else bytes(data)
