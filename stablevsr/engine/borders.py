"""The estimates that cross the borders of segments, in an array of a store."""

from collections.abc import Sequence

from torch import Tensor

from stablevsr.engine.store import Array


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
