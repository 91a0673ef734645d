"""Static HDR metadata: the mastering display and the content light level."""

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
_DISPLAY = struct.Struct("=20i2i")  # AVMasteringDisplayMetadata: 10 fractions and two flags
_LIGHT = struct.Struct("=2I")  # AVContentLightMetadata


@dataclass(frozen=True)
class Mastering:
    """Metadata by SMPTE ST 2086 and CTA-861.3; None for what the file does not store.

    display: x and y of red, green, blue and white, then the lowest and highest luminance in cd/m2.
    light: MaxCLL and MaxFALL in cd/m2.
    """

    display: tuple[Fraction, ...] | None = None
    light: tuple[int, int] | None = None

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Self | None:
        """From the side data of a decoded frame; None if there is none."""
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
        """Parameters for x265, the only encoder here that writes this metadata."""
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
    """Whether a frame has dynamic metadata: HDR10+ or Dolby Vision."""
    return any(frame_data(frame, kind) for kind in _DYNAMIC)


def frame_data(frame: av.VideoFrame, kind: SideData) -> bytes:
    """Side data of a decoded frame; b"" if there is none of this kind."""
    found = cast("Mapping[SideData, Buffer]", frame.side_data)  # which PyAV's stubs call a dict with other keys
    data = found.get(kind)
    return b"" if data is None else bytes(data)
