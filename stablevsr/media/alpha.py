"""Splitting an image into color and alpha."""

import numpy as np


def split_alpha(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Split (h, w, 3 or 4) into RGB (h, w, 3) and alpha (h, w); alpha is None for three channels.

    Fully transparent pixels take the colors of visible ones nearby. What files store there (black, white, leftovers
    of an eraser) would otherwise bleed into the edges of the visible part when the image is enlarged.
    """
    if image.shape[2] == 3:
        return image, None
    colours, alpha = np.ascontiguousarray(image[..., :3]), np.ascontiguousarray(image[..., 3])
    if alpha.all() or not alpha.any():  # all or nothing is transparent
        return colours, alpha
    weight = alpha[..., None].astype(np.float32)
    spread = _spread(colours * weight, weight).round().astype(image.dtype)
    return np.where(weight > 0, colours, spread), alpha


def _spread(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted means: sums (h, w, 3) over weights (h, w, 1); where the weight is 0, the mean of a larger square."""
    colours = total / np.maximum(weight, 1e-9)
    if weight.size == 1 or weight.min() > 0:
        return colours
    height, width = weight.shape[:2]
    coarse = _spread(_sum_of_squares(total), _sum_of_squares(weight)).repeat(2, axis=0).repeat(2, axis=1)
    return np.where(weight > 0, colours, coarse[:height, :width])


def _sum_of_squares(values: np.ndarray) -> np.ndarray:
    """Sums over the 2 x 2 squares of (h, w, c); squares at the border may be smaller."""
    height, width, channels = values.shape
    padded = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return padded.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels).sum(axis=(1, 3))
