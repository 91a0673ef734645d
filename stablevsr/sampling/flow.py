"""Optical flow between neighbouring frames, at HR size (paper, section 4.2)."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import SCALE
from stablevsr.nn.raft import RAFT, STRIDE, bilinear_upsample
from stablevsr.runtime import numerics, to_device
from stablevsr.sampling.pictures import Frames, bicubic

MIN_SIDE = 128  # below this, RAFT's coarsest correlation level has a single entry and its lookup divides by zero


@dataclass(frozen=True)
class Padding:
    """Padding of RAFT's input at the right and bottom, and its inverse."""

    right: int
    bottom: int

    @classmethod
    def for_size(cls, height: int, width: int) -> "Padding":
        """Padding to the next multiple of 8 that is at least 128."""

        def missing(side: int) -> int:
            return max(-(-side // STRIDE) * STRIDE, MIN_SIDE) - side

        return cls(missing(width), missing(height))

    def pad(self, picture: Tensor) -> Tensor:
        """Repeat the border: (n, c, h, w) to (n, c, h + bottom, w + right)."""
        return F.pad(picture, (0, self.right, 0, self.bottom), mode="replicate")

    def crop(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return padded[..., : padded.shape[-2] - self.bottom, : padded.shape[-1] - self.right]


class FlowSource(Protocol):
    """The flows of a clip, stored or estimated on demand."""

    def between(self, target: int, source: int) -> Tensor:
        """The flow that warps frame `source` onto the grid of its neighbour `target`: (1, 2, 4h, 4w) in pixels."""
        ...


def estimate_flow(raft: nn.Module, target: Tensor, source: Tensor, half: bool = False) -> Tensor:
    """The flow that warps `source` onto the grid of `target`.

    Args:
        raft: the flow network.
        target, source: (n, 3, h, w) LR frames in [-1, 1], of any size.
        half: estimate at half the HR size, where this `halves_work`, and upsample the flow.

    Returns:
        (n, 2, 4h, 4w), in HR pixels.
    """
    size = (SCALE * target.shape[-2], SCALE * target.shape[-1])
    half = half and halves_work(*size)
    target, source = (_raft_input(frame, half) for frame in (target, source))
    padding = Padding.for_size(*target.shape[-2:])
    return _to_size(padding.crop(raft(padding.pad(target), padding.pad(source))), size, half)


def halves_work(height: int, width: int) -> bool:
    """Whether estimating flow at half of this HR size takes at most half the work.

    Small pictures are padded, so they gain little from it, and their flow becomes worse.
    """

    def work(height: int, width: int) -> int:
        padding = Padding.for_size(height, width)
        return (height + padding.bottom) * (width + padding.right)

    return 2 * work(height // 2, width // 2) <= work(height, width)


def _raft_input(frame: Tensor, half: bool) -> Tensor:
    return F.avg_pool2d(bicubic(frame), 2) if half else bicubic(frame)


def _to_size(flow: Tensor, size: tuple[int, int], half: bool) -> Tensor:
    return 2 * F.interpolate(flow, size, mode="bilinear", align_corners=False) if half else flow


class EstimatedFlows:
    """The flows of a clip, estimated on demand.

    `estimate` and `enlarge` are separate, so that a flow can be stored at the size at which it is estimated: an eighth
    of HR for RAFT small, half of that with `half_size`. Together they match `estimate_flow` bit for bit.

    Args:
        raft: the flow network, in float32.
        frames: the LR frames.
        device: where the network runs.
        half_size: as `half` of `estimate_flow`.
    """

    def __init__(self, raft: RAFT, frames: Frames, device: torch.device, half_size: bool = False) -> None:
        self._raft, self._frames, self._device = raft, frames, device
        height, width = (SCALE * side for side in frames[0].shape[-2:])
        self._size, self._half = (height, width), half_size and halves_work(height, width)
        self._input_size = (height // 2, width // 2) if self._half else self._size
        self._padding = Padding.for_size(*self._input_size)
        self._features: dict[int, Tensor] = {}  # of recent frames: each is in two pairs, in both directions
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an estimate, (2, h', w')."""
        height, width = self._input_size
        if self._raft.config.convex_upsampling:
            return 2, height, width
        return 2, (height + self._padding.bottom) // STRIDE, (width + self._padding.right) // STRIDE

    def between(self, target: int, source: int) -> Tensor:
        return self.enlarge(self.estimate(target, source)[None])

    @numerics()
    @torch.no_grad()
    def estimate(self, target: int, source: int) -> Tensor:
        """The flow that warps frame `source` onto the grid of its neighbour `target`, of `shape`."""
        self._encode(target, source)
        features = self._features[target], self._features[source]
        flow, hidden = self._raft.estimate(*features, self._contexts[target])
        if self._raft.config.convex_upsampling:
            flow = self._padding.crop(self._raft.upsample(flow, hidden))
        return flow[0]

    @numerics()
    @torch.no_grad()
    def enlarge(self, flow: Tensor) -> Tensor:
        """From `estimate`'s size to HR: (1, *shape) to (1, 2, 4h, 4w), in HR pixels."""
        if not self._raft.config.convex_upsampling:
            flow = self._padding.crop(bilinear_upsample(flow))
        return _to_size(flow, self._size, self._half)

    def forget(self) -> None:
        """Free the features of recent frames, once no more flows are needed."""
        self._features.clear()
        self._contexts.clear()

    def _encode(self, target: int, source: int) -> None:
        """Compute what is missing of the features of two neighbours and the context of the target."""
        missing = [frame for frame in sorted((target, source)) if frame not in self._features]
        if missing:
            # Always a batch of two, whichever the other frame is: a batch of one may round differently.
            first = missing[0] if missing[0] + 1 < len(self._frames) else missing[0] - 1
            pair = first, first + 1
            pictures = {frame: self._picture(frame) for frame in pair}
            for frame, features in zip(pair, self._raft.features(*pictures.values()), strict=True):
                self._features[frame] = features
            self._contexts |= {frame: self._raft.context(picture) for frame, picture in pictures.items()}
        for kept in (self._features, self._contexts):
            for frame in [frame for frame in kept if abs(frame - target) > 2]:
                del kept[frame]

    def _picture(self, frame: int) -> Tensor:
        return self._padding.pad(_raft_input(to_device(self._frames[frame][None], self._device), self._half))


class StreamFlows:
    """The flows of a stream, from each frame to the previous one; each frame's features are computed once.

    Args:
        raft: the flow network, in float32.
        half_size: as `half` of `estimate_flow`.
    """

    def __init__(self, raft: RAFT, half_size: bool = False) -> None:
        self._raft, self._half = raft, half_size
        self._last: tuple[Tensor, Tensor] | None = None  # LR frame and features

    def to_previous(self, frame: Tensor, previous: Tensor) -> Tensor:
        """The flow that warps `previous` onto the grid of `frame`, LR frames (3, h, w) in [-1, 1]: (2, 4h, 4w)."""
        size = (SCALE * frame.shape[-2], SCALE * frame.shape[-1])
        half = self._half and halves_work(*size)
        picture = _raft_input(frame[None], half)
        padding = Padding.for_size(*picture.shape[-2:])
        picture = padding.pad(picture)
        features = self._raft.encode(picture)
        if self._last is None or self._last[0] is not previous:
            self._last = previous, self._raft.encode(padding.pad(_raft_input(previous[None], half)))
        flow, hidden = self._raft.estimate(features, self._last[1], self._raft.context(picture))
        self._last = frame, features
        return _to_size(padding.crop(self._raft.upsample(flow, hidden)), size, half)[0]
