"""The estimates that cross the borders of segments, in an array of a store."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.store import Array
from stablevsr.sampling.segments import Borders


class StoredBorders:
    """`sampling.segments.Borders` of a clip in one store.

    Args:
        array: of latents, with two entries for each border: one for either direction, so that the input of a pass
            outlives it.
        starts: the frames that start a segment.
    """

    def __init__(self, array: Array, starts: Sequence[int]) -> None:
        self._array, self.starts = array, starts
        self._number = {start: number for number, start in enumerate(starts)}

    def get(self, index: int, frame: int) -> Tensor | None:
        slot = self._slot(index, frame)
        return None if index < 0 or slot is None else self._array.read(slot)

    def put(self, index: int, frame: int, x0: Tensor) -> None:
        slot = self._slot(index, frame)
        if slot is not None:
            self._array.write(slot, x0)

    def _slot(self, index: int, frame: int) -> int | None:
        # A forward pass begins a segment after its border, a backward one before the next segment's.
        number = self._number.get(frame if index % 2 == 0 else frame + 1)
        return None if number is None else 2 * number + index % 2


@dataclass(frozen=True)
class Neighbors:
    """What a run over one segment of a scene has of the segments beside it, which are sampled elsewhere."""

    borders: Borders
    frames: LowResFrames  # the segment's, with the neighbor's at index -1 and after the last, if they are there
    before: int = 0  # 1 if there is a segment before it
    after: int = 0


class OuterBorders:
    """`sampling.segments.Borders` of one segment, whose neighbors are sampled elsewhere.

    Args:
        array: of latents, with two entries: the segment's own last estimate in either direction.
        given: the neighbor's estimate (c, h, w) for the next pass; None if there is none.
    """

    starts: Collection[int] = ()

    def __init__(self, array: Array, given: Tensor | None) -> None:
        self._array, self._given = array, given

    def get(self, index: int, frame: int) -> Tensor | None:
        return self._given

    def put(self, index: int, frame: int, x0: Tensor) -> None:
        self._array.write(index % 2, x0)

    def left(self, index: int) -> Tensor:
        """What pass `index`, one of the last two, has left for a neighbor: (c, h, w)."""
        return self._array.read(index % 2)
