"""The size of the result, which need not be the fourfold one that the networks make, and the way there."""

from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.errors import OptionsError
from stablevsr.sampling.config import SamplingConfig

MAX_PASSES = 2  # of the model, each of which enlarges by `SCALE`
MIN_VIDEO_SIDE = SCALE  # pixels, as a single one becomes; below it SVT-AV1 takes the whole process down


def output_size(
    config: SamplingConfig, height: int, width: int, even: bool = False, passes: int = 1
) -> tuple[int, int]:
    """(height, width) of the result for LR frames of `height` x `width`.

    `scale` and `height` keep the shape, to the nearest pixel; `size` need not.

    Args:
        even: as the codecs of videos need it: derived sides are rounded to even numbers, odd ones that were asked for
            and those below `MIN_VIDEO_SIDE` are refused.
        passes: of the model that the caller can make; streaming mode makes one only.

    Raises:
        OptionsError: for a size above what these passes give, and for odd and tiny sides as above.
    """
    if config.size is not None:
        found, said = config.size_in_pixels, f"size {config.size}"
    elif config.height is not None:
        found, said = (
            (config.height, _nearest(Fraction(config.height * width, height), even)),
            f"height {config.height}",
        )
    elif config.scale is not None:
        scale, said = Fraction(config.scale), f"scale {config.scale:g}"
        found = _nearest(scale * height, even), _nearest(scale * width, even)
    else:
        return SCALE * height, SCALE * width
    most = SCALE if config.mode == "streaming" else SCALE**passes
    if found[0] > most * height or found[1] > most * width:
        where = ", in streaming mode and on several machines" if most == SCALE else ""
        raise OptionsError(
            f"got {said} for {width}x{height}, expected at most {most} times as large, {most * width}x{most * height}"
            f"{where}: for more, upscale the result once more"
        )
    if even and (found[0] % 2 or found[1] % 2):
        sides = found[:1] if config.size is None else found[::-1]
        better = "x".join(str(side + side % 2) for side in sides)
        raise OptionsError(f"got {said} for a video, whose sides must be even: use {better}")
    if even and min(found) < MIN_VIDEO_SIDE:
        raise OptionsError(
            f"got {said}, which is {found[1]}x{found[0]}, for a video, whose sides must be at least {MIN_VIDEO_SIDE}"
        )
    return found


def passes_for(size: tuple[int, int], lr_size: tuple[int, int]) -> int:
    """How often the model runs, each time on the result of the last, for a result of (height, width) `size`."""
    return 1 if size[0] <= SCALE * lr_size[0] and size[1] <= SCALE * lr_size[1] else MAX_PASSES


def _nearest(length: Fraction, even: bool) -> int:
    """The nearest number of pixels, at least one; of two that are equally near, the larger."""
    unit = 2 if even else 1
    return max(unit, int(length / unit + Fraction(1, 2)) * unit)


def pixel_aspect(aspect: Fraction, lr_size: tuple[int, int], size: tuple[int, int]) -> Fraction:
    """Width over height of one pixel of the result, with which players show it in the shape of the input.

    Args:
        aspect: width over height of one LR pixel.
        lr_size: (height, width) of the input.
        size: (height, width) of the result; where it keeps the input's shape to a pixel, its pixels do too.
    """
    if keeps_shape(lr_size, size):
        return aspect
    exact = aspect * Fraction(lr_size[1] * size[0], lr_size[0] * size[1])
    return exact.limit_denominator(10_000)  # H.264 stores both numbers in 16 bits


def keeps_shape(lr_size: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one side follows from the other to the pixel, or to the two of an even number."""
    (low_height, low_width), (height, width) = lr_size, size
    return (
        abs(width - Fraction(height * low_width, low_height)) <= 1
        or abs(height - Fraction(width * low_height, low_width)) <= 1
    )


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture at (height, width) `size`, by an antialiased Lanczos filter; unchanged if it has that size.

    Pillow's, in floating point, so that 16 bits stay 16 bits. At half the size it keeps 93% of a wave at 0.7 of the
    result's highest frequency and lets 7% of one at 1.3 through as aliasing; torch's antialiased bicubic, though
    faster, 80% and 19%.

    Args:
        picture: (h, w, c) uint8 or uint16 over the whole range, or (c, h, w) float in [0, 1], on the CPU.
    """
    is_float = picture.is_floating_point()
    if tuple(picture.shape[-2:] if is_float else picture.shape[:2]) == size:
        return picture
    values = picture.numpy()
    planes = [_resized(plane, size) for plane in (values if is_float else np.moveaxis(values, -1, 0))]
    if is_float:
        return torch.from_numpy(np.stack(planes).clip(0, 1)).to(picture.dtype)
    found = np.stack(planes, axis=-1)
    return torch.from_numpy(found.clip(0, np.iinfo(values.dtype).max).round().astype(values.dtype))


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) to (*size) float32."""
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))
