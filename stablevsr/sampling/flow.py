"""Optical flow between neighbouring frames, at HR size (paper, section 4.2)."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import SCALE
from stablevsr.nn.raft import STRIDE
from stablevsr.sampling.pictures import bicubic

MIN_SIDE = 128  # below, RAFT's coarsest correlation level has a single entry and its lookup divides by zero


@dataclass(frozen=True)
class Padding:
    """What RAFT's input needs at the right and bottom, and the way back."""

    right: int
    bottom: int

    @classmethod
    def for_size(cls, height: int, width: int) -> "Padding":
        """To the next multiple of 8 that is at least 128."""

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
    """The flows of a clip, kept or computed when asked for."""

    def between(self, target: int, source: int) -> Tensor:
        """The flow that fetches frame `source` onto the grid of its neighbour `target`: (1, 2, 4h, 4w) in pixels."""
        ...


@dataclass(frozen=True)
class Flows:
    """The flows of a clip of n frames, in pixels at HR size; entry i belongs to the pair (i, i + 1)."""

    forward: Tensor  # (n - 1, 2, 4h, 4w): from the pixels of frame i + 1 to their places in frame i
    backward: Tensor  # (n - 1, 2, 4h, 4w): from the pixels of frame i to their places in frame i + 1

    def between(self, target: int, source: int) -> Tensor:
        pair = slice(min(target, source), min(target, source) + 1)
        return self.forward[pair] if target > source else self.backward[pair]


def estimate_flow(raft: nn.Module, target: Tensor, source: Tensor, half: bool = False) -> Tensor:
    """The flow that fetches `source` onto the grid of `target`.

    Args:
        raft: the flow network.
        target, source: (n, 3, h, w) LR frames in [-1, 1], of any size.
        half: look at frames of half the HR size, which takes a quarter of the time, and enlarge the flow.

    Returns:
        (n, 2, 4h, 4w), in HR pixels.
    """
    size = [SCALE * side for side in target.shape[-2:]]
    target, source = bicubic(target), bicubic(source)
    if half:
        target, source = (F.avg_pool2d(frame, 2) for frame in (target, source))
    padding = Padding.for_size(*target.shape[-2:])
    flow = padding.crop(raft(padding.pad(target), padding.pad(source)))
    return 2 * F.interpolate(flow, size, mode="bilinear", align_corners=False) if half else flow


def empty_flows(num_frames: int, height: int, width: int) -> Flows:
    """Room for the flows of a clip of LR size (height, width)."""
    shape = (max(num_frames - 1, 0), 2, SCALE * height, SCALE * width)
    return Flows(torch.empty(shape), torch.empty(shape))
