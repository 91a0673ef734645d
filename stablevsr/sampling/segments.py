"""Long scenes in segments, all of which can work on the same pass at once. Not in the paper.

Inside a scene the chain of guidance is strict: every frame is guided by the estimate of the one before it in the same
pass. At the border of a segment it is cut: the first frame that a segment works on is guided by its neighbor's estimate
of the *previous* pass, one noise level older. Passes alternate in direction, so in that pass the neighbor was the first
frame of its own segment: it is ready as soon as that segment has begun. One tensor crosses each border per pass.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor


class Borders(Protocol):
    """Where segments leave what their neighbors need, and find what these left: clean estimates, at the borders."""

    @property
    def starts(self) -> Collection[int]:
        """The frames that start a new segment, apart from the first one."""
        ...

    def get(self, index: int, frame: int) -> Tensor | None:
        """The estimate (c, h, w) of `frame` in pass `index`; None if there is none, as before the first pass."""
        ...

    def put(self, index: int, frame: int, x0: Tensor) -> None:
        """Keep the estimate of `frame`, the first that its segment worked on in pass `index`."""
        ...


@dataclass(frozen=True)
class NoBorders:
    """`Borders` of a clip without segments, or of segments that exchange nothing."""

    starts: Collection[int] = ()

    def get(self, index: int, frame: int) -> Tensor | None:
        return None

    def put(self, index: int, frame: int, x0: Tensor) -> None:
        pass


NO_BORDERS = NoBorders()


def segment_starts(longest: int | None, cuts: Sequence[int], num_frames: int) -> list[int]:
    """The frames that start a segment inside a scene, so that no segment has more than `longest` frames.

    The segments of a scene are as equal as can be.

    Args:
        cuts: the frames that start a new scene.
    """
    if longest is None:
        return []
    starts = []
    for first, last in pairwise([0, *cuts, num_frames]):
        count = -(-(last - first) // longest)
        starts += [first + index * (last - first) // count for index in range(1, count)]
    return starts
