"""Conversion between the YUV of video streams and RGB of 8 or 16 bits a channel.

Reading trusts the stream's tags. Primaries and transfer function are never converted: RGB keeps those of the source,
and the output is tagged with them (`Colours.label`). YUV is written with BT.709's matrix, or BT.2020's, in limited
range. HDR keeps its static metadata (the mastering display and the content light level) for the encoder that writes it.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Self, cast

import av
import numpy as np
from av.buffer import Buffer
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

TAGS = {  # attributes of an encoder's context; for BT.709 swscale's number and the stream's tag are the same
    "colorspace": Colorspace.ITU709,
    "color_primaries": ColorPrimaries.BT709,
    "color_trc": ColorTrc.BT709,
    "color_range": ColorRange.MPEG,
}

UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED, AVCOL_PRI_UNSPECIFIED, AVCOL_TRC_UNSPECIFIED
BT709 = 1
_BT2020 = 9  # AVCOL_PRI_BT2020, and AVCOL_SPC_BT2020_NCL
_LIMITED = 1  # AVCOL_RANGE_MPEG
_SD_MATRIX, _HD_MATRIX = 6, 1  # AVCOL_SPC_SMPTE170M (BT.601), AVCOL_SPC_BT709

# Without these flags swscale's shortcuts are off by up to 3/255, and chroma is repeated instead of interpolated.
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
HDR_TRANSFERS = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
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


@dataclass(frozen=True)
class Colours:
    """How RGB values are to be interpreted, as FFmpeg's enum values; BT.709 by default.

    mastering: the static HDR metadata, if there is any.
    """

    primaries: int = BT709
    transfer: int = BT709
    mastering: Mastering | None = None

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Colours":
        """From the tags of a frame; players take BT.709 for those that are missing, and so does this."""
        said = int(frame.color_primaries), int(frame.color_trc)
        primaries, transfer = (BT709 if number in (0, UNTAGGED) else number for number in said)  # 0 is reserved
        return cls(primaries, transfer, Mastering.of(frame))

    @property
    def matrix(self) -> int:
        """The matrix for writing YUV. BT.2020 keeps its own, which some players assume."""
        return _BT2020 if self.primaries == _BT2020 else BT709

    def label_frame(self, frame: av.VideoFrame) -> None:
        """Tag a frame for the encoder: ProRes reads the tags of frames, not those of its context."""
        frame.color_primaries, frame.color_trc = self.primaries, self.transfer
        if _is_yuv(frame.format):
            frame.colorspace = self.matrix

    def label(self, context: av.VideoCodecContext) -> None:
        """Tag an encoder's context, whose pixel format must be set."""
        context.color_primaries, context.color_trc = self.primaries, self.transfer
        if context.pix_fmt and context.pix_fmt.startswith("yuv"):
            context.colorspace, context.color_range = self.matrix, ColorRange.MPEG
        else:
            context.colorspace, context.color_range = 0, ColorRange.JPEG  # AVCOL_SPC_RGB


def bits(frame: av.VideoFrame) -> int:
    """Bits per channel of a frame."""
    return max(component.bits for component in frame.format.components)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether any pixel of a frame is not opaque."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    return has_alpha and bool((frame.to_ndarray(format="rgba")[..., 3] < 255).any())


def matrix_for(height: int) -> int:
    """The matrix that untagged YUV of so many lines counts as: BT.601 below 720, BT.709 from there."""
    return _HD_MATRIX if height >= 720 else _SD_MATRIX


def to_rgb(frame: av.VideoFrame, deep: bool = False) -> np.ndarray:
    """Convert a decoded frame to (h, w, 3) RGB by its own matrix and range: uint16 if `deep`, else uint8.

    Untagged YUV counts as BT.601 below 720 lines, as BT.709 otherwise, in limited range. Raises av.FFmpegError for a
    matrix that swscale does not know.
    """
    if frame.colorspace == UNTAGGED:
        frame.colorspace = matrix_for(frame.height)
    form = "rgb48le" if deep else "rgb24"
    if _is_limited_gray(frame):
        return _from_limited_gray(frame, deep)
    image = frame.reformat(format=form, dst_color_range=ColorRange.JPEG, interpolation=_EXACT).to_ndarray()
    return _scaled(image, 257, 256) if deep and _is_yuv(frame.format) else image


def to_frame(image: np.ndarray, pix_fmt: str, matrix: int = BT709) -> av.VideoFrame:
    """Convert (h, w, 3) RGB, uint8 or uint16, to an encoder's frame: YUV of that matrix in limited range, or RGB."""
    deep = image.dtype == np.uint16
    if deep and pix_fmt.startswith("yuv"):
        image = _scaled(image, 256, 257)
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb48le" if deep else "rgb24")
    if not pix_fmt.startswith("yuv"):
        return rgb.reformat(format=pix_fmt)
    return rgb.reformat(
        format=pix_fmt,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=_EXACT,
    )


def _is_limited_gray(frame: av.VideoFrame) -> bool:
    return not frame.format.is_rgb and len(frame.format.components) == 1 and frame.color_range == _LIMITED


def _from_limited_gray(frame: av.VideoFrame, deep: bool) -> np.ndarray:
    # swscale assumes full range for gray.
    depth = bits(frame)
    levels = frame.to_ndarray().astype(np.float32) / (1 << (depth - 8))
    top = 65535 if deep else 255
    gray = ((levels - 16) * (top / 219)).round().clip(0, top).astype(np.uint16 if deep else np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _is_yuv(form: av.VideoFormat) -> bool:
    return not form.is_rgb and len(form.components) >= 3


def _scaled(image: np.ndarray, up: int, down: int) -> np.ndarray:
    # Between YUV and 16-bit RGB, swscale's white is 255 * 256, not 65535.
    return np.minimum((image.astype(np.uint32) * up + down // 2) // down, 65535).astype(np.uint16)
