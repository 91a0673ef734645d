"""Between the YUV of video streams and 8-bit RGB.

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


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Decoded frame -> (h, w, 3) uint8 RGB with the frame's own matrix and range.

    Untagged YUV counts as BT.601 below 720 lines and BT.709 from there, limited range. Raises av.FFmpegError for a
    matrix that swscale does not know.
    """
    if frame.colorspace == _UNTAGGED:
        frame.colorspace = _HD_MATRIX if frame.height >= 720 else _SD_MATRIX
    rgb = frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=_EXACT)
    return rgb.to_ndarray()


def to_frame(image: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    """(h, w, 3) RGB, uint8 or uint16, to a frame for an encoder: YUV in BT.709 and limited range, or RGB as it is."""
    rgb = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(image), format="rgb48le" if image.dtype == np.uint16 else "rgb24"
    )
    if not pix_fmt.startswith("yuv"):
        return rgb.reformat(format=pix_fmt)
    return rgb.reformat(
        format=pix_fmt,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=_EXACT,
    )
