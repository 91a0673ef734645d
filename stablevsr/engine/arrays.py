"""The sampler's frames, latents and flows, on the arrays of a store."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stablevsr.engine.store import Array
from stablevsr.runtime import to_device
from stablevsr.sampling.bidirectional import pass_order
from stablevsr.sampling.flow import EstimatedFlows
from stablevsr.sampling.noise import NoiseSource, as_draw
from stablevsr.sampling.pictures import in_model_range


class LowResFrames:
    """LR frames as `sampling.pictures.Frames`.

    Args:
        array: (h, w, 3) uint8 or uint16, or (3, h, w) float in [0, 1] each.
        count: the number of frames.
        size: (height, width).
    """

    def __init__(self, array: Array, count: int, size: tuple[int, int]) -> None:
        self._array, self._count, self.size = array, count, size

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[frame] for frame in range(self._count))

    def __getitem__(self, frame: int) -> Tensor:
        """(3, h, w) float32 in [-1, 1], on the CPU."""
        return in_model_range(self._array.read(frame))

    def raw(self, frame: int) -> Tensor:
        """The frame as it is stored."""
        return self._array.read(frame)

    def prefetch(self, frame: int) -> None:
        self._array.prefetch(frame)


class StepLatents:
    """Latents as `sampling.bidirectional.Latents`, which start as noise.

    With two slots per frame, written in turn, an interrupted frame-step leaves its input intact.

    Args:
        array: of `shape`, with `slots` entries per frame.
        noise: where the initial latents come from.
        shape: (c, h, w).
        done: the number of frame-steps done so far.
        slots: per frame, 1 or 2.
    """

    def __init__(
        self,
        array: Array,
        num_frames: int,
        noise: NoiseSource,
        shape: tuple[int, int, int],
        device: torch.device,
        done: int,
        slots: int,
    ) -> None:
        self._array, self._noise, self._shape, self._device, self._slots = array, noise, shape, device, slots
        self._last: tuple[int, Tensor] | None = None  # read again at once where a pass turns
        passes, visited = divmod(done, num_frames)
        self._writes = [passes] * num_frames
        for frame in pass_order(passes, num_frames)[:visited]:
            self._writes[frame] += 1

    def __len__(self) -> int:
        return len(self._writes)

    def __getitem__(self, frame: int) -> Tensor:
        if self._last is not None and self._last[0] == frame:
            return self._last[1]
        if self._writes[frame] == 0:
            return to_device(as_draw(self._noise.initial(frame), self._shape, f"frame {frame}"), self._device)
        return self._array.read(self._slot(frame, self._writes[frame]))

    def __setitem__(self, frame: int, latent: Tensor) -> None:
        self._array.write(self._slot(frame, self._writes[frame] + 1), latent)
        self._last = frame, latent
        self._writes[frame] += 1

    def prefetch(self, frame: int) -> None:
        if self._writes[frame] > 0:
            self._array.prefetch(self._slot(frame, self._writes[frame]))

    def _slot(self, frame: int, writes: int) -> int:
        return self._slots * frame + writes % self._slots


class KeptFlows:
    """Flows as `sampling.flow.FlowSource`, stored at the size at which they were estimated.

    Args:
        array: (2, *estimated.shape), for each pair of frames the forward and the backward flow.
        estimated: enlarges them.
        first: the first frame of the first pair; -1 with a neighbor before the frames.
    """

    def __init__(self, array: Array, estimated: EstimatedFlows, first: int = 0) -> None:
        self._array, self._estimated, self._first = array, estimated, first

    def between(self, target: int, source: int) -> Tensor:
        pair = self._array.read(min(target, source) - self._first)
        return self._estimated.enlarge(pair[None, 0 if target > source else 1])
