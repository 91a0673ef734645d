"""Between the YUV of video streams and RGB of 8 or 16 bits a channel.

Reading trusts the stream's tags. YUV is always written as BT.709 in limited range, and `TAGS` says so in the file.
"""

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

TAGS = {  # attributes of an encoder's context; for BT.709 swscale's number and the stream's tag are the same
    "colorspace": Colorspace.ITU709,
    "color_primaries": ColorPrimaries.BT709,
    "color_trc": ColorTrc.BT709,
    "color_range": ColorRange.MPEG,
}

_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED
_SD_MATRIX, _HD_MATRIX = 6, 1  # AVCOL_SPC_SMPTE170M (BT.601), AVCOL_SPC_BT709

# Without these flags swscale takes short cuts that are off by up to 3/255 and repeat chroma instead of filtering it.
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)


def bits(frame: av.VideoFrame) -> int:
    """How many bits a channel has."""
    return max(component.bits for component in frame.format.components)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether a pixel of a frame is less than opaque."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    return has_alpha and bool((frame.to_ndarray(format="rgba")[..., 3] < 255).any())


def to_rgb(frame: av.VideoFrame, deep: bool = False) -> np.ndarray:
    """Decoded frame -> (h, w, 3) RGB with the frame's own matrix and range: uint16 when `deep`, else uint8.

    Untagged YUV counts as BT.601 below 720 lines and BT.709 from there, limited range. Raises av.FFmpegError for a
    matrix that swscale does not know.
    """
    if frame.colorspace == _UNTAGGED:
        frame.colorspace = _HD_MATRIX if frame.height >= 720 else _SD_MATRIX
    form = "rgb48le" if deep else "rgb24"
    image = frame.reformat(format=form, dst_color_range=ColorRange.JPEG, interpolation=_EXACT).to_ndarray()
    return _scaled(image, 257, 256) if deep and _is_yuv(frame.format) else image


def to_frame(image: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    """(h, w, 3) RGB, uint8 or uint16, to a frame for an encoder: YUV in BT.709 and limited range, or RGB as it is."""
    deep = image.dtype == np.uint16
    if deep and pix_fmt.startswith("yuv"):
        image = _scaled(image, 256, 257)
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb48le" if deep else "rgb24")
    if not pix_fmt.startswith("yuv"):
        return rgb.reformat(format=pix_fmt)
    return rgb.reformat(
        format=pix_fmt,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=_EXACT,
    )


def _is_yuv(form: av.VideoFormat) -> bool:
    return not form.is_rgb and len(form.components) >= 3


def _scaled(image: np.ndarray, up: int, down: int) -> np.ndarray:
    # Between YUV and RGB of 16 bits swscale takes white for 255 * 256, not for 65535.
    return np.minimum((image.astype(np.uint32) * up + down // 2) // down, 65535).astype(np.uint16)
