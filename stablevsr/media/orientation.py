"""The eight orientations of a stored picture, and how to undo them."""

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Orientation:
    """Swap rows and columns, then mirror left-right (flip_x), then mirror top-bottom (flip_y)."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def from_exif(cls, tag: object) -> Self:
        """From EXIF tag 274; unknown values count as upright, as in viewers."""
        return cls(*_EXIF.get(tag, ())) if isinstance(tag, int) else cls()

    @classmethod
    def from_display_matrix(cls, matrix: np.ndarray) -> Self:
        """From FFmpeg's nine numbers: stored (x, y) is shown at (m0 x + m3 y, m1 x + m4 y); nearest quarter turn."""
        a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
        if abs(b) > abs(a):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return `image` (h, w, ...) upright, as (w, h, ...) if transposed; a view."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


_EXIF = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
