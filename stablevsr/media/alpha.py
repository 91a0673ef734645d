"""Colour and transparency of a picture, apart."""

import numpy as np


def split_alpha(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(h, w, 3 or 4) to RGB (h, w, 3) and alpha (h, w), None where there is none.

    Pixels that nobody can see get the colours of the visible ones nearby: what files keep there (black, white, what
    an eraser left) would else shine through where the enlarged edge of the visible part covers it.
    """
    if image.shape[2] == 3:
        return image, None
    colours, alpha = np.ascontiguousarray(image[..., :3]), np.ascontiguousarray(image[..., 3])
    if alpha.all() or not alpha.any():  # nothing is hidden, or everything
        return colours, alpha
    weight = alpha[..., None].astype(np.float32)
    spread = _spread(colours * weight, weight).round().astype(image.dtype)
    return np.where(weight > 0, colours, spread), alpha


def _spread(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted sums (h, w, 3) over their weights (h, w, 1); where there is no weight, the mean of a larger square."""
    colours = total / np.maximum(weight, 1e-9)
    if weight.size == 1 or weight.min() > 0:
        return colours
    height, width = weight.shape[:2]
    coarse = _spread(_sum_of_squares(total), _sum_of_squares(weight)).repeat(2, axis=0).repeat(2, axis=1)
    return np.where(weight > 0, colours, coarse[:height, :width])


def _sum_of_squares(values: np.ndarray) -> np.ndarray:
    """Each 2 x 2 square of (h, w, c) summed up, at the border what there is of it."""
    height, width, channels = values.shape
    padded = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return padded.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels).sum(axis=(1, 3))
