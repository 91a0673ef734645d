"""Clips as users hold them, to the model's range and back."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.errors import UserError

Clip = np.ndarray | Tensor


class Frames(Protocol):
    """The LR frames of a clip, in memory or not; each (3, h, w) in [-1, 1]. A tensor (n, 3, h, w) will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, frame: int) -> Tensor: ...


def as_tensor(frames: Clip) -> Tensor:
    """A clip as a tensor; `UserError` for numpy types that torch does not have."""
    if isinstance(frames, Tensor):
        return frames
    try:
        return torch.from_numpy(np.require(frames, requirements=["C", "W"]))  # flipped arrays and read-only ones too
    except TypeError as error:
        raise UserError(f"got frames of type {frames.dtype}, expected uint8 or float") from error


def normalise(frames: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 or uint16 to (n, 3, h, w) float32 in [-1, 1]."""
    half = torch.iinfo(frames.dtype).max / 2
    return rearrange(frames, "n h w c -> n c h w").contiguous().float() / half - 1.0


def to_uint8(frames: Tensor) -> Tensor:
    """The way back, from the unit range: (n, 3, h, w) in [0, 1] to (n, h, w, 3) uint8, rounded."""
    return rearrange((frames * 255.0).round(), "n c h w -> n h w c").to(torch.uint8)


def to_uint16(frames: Tensor) -> Tensor:
    """The same with 16 bits: (n, 3, h, w) in [0, 1] to (n, h, w, 3) uint16."""
    return rearrange((frames.double() * 65535.0).round(), "n c h w -> n h w c").to(torch.uint16)


def bicubic(low_res: Tensor) -> Tensor:
    """Four times as large by plain interpolation, in any range: (n, c, h, w) to (n, c, 4h, 4w); it overshoots."""
    return F.interpolate(low_res, scale_factor=SCALE, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class ClipKind:
    """Which of the accepted kinds a clip is, so that the result comes back as the same."""

    is_numpy: bool
    is_uint8: bool
    device: torch.device

    @classmethod
    def of(cls, frames: Clip) -> "ClipKind":
        """Raises `UserError` for anything but (n, h, w, 3) uint8 and (n, 3, h, w) float in [0, 1]."""
        wanted = "expected (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1]"
        if not isinstance(frames, np.ndarray | Tensor):
            raise UserError(f"got frames of type {type(frames).__name__}, {wanted}, as a numpy array or a torch tensor")
        tensor = as_tensor(frames)
        is_uint8 = tensor.dtype == torch.uint8
        shape = tuple(tensor.shape)
        fits = len(shape) == 4 and shape[3 if is_uint8 else 1] == 3 and min(shape) > 0
        if not fits or not (is_uint8 or tensor.is_floating_point()):
            raise UserError(f"got frames of shape {shape} and type {tensor.dtype}, {wanted}")
        if not is_uint8:
            low, high = tensor.min().item(), tensor.max().item()
            if not (low >= 0.0 and high <= 1.0):  # also for NaN
                raise UserError(f"got float frames between {low:g} and {high:g}, expected [0, 1]")
        return cls(isinstance(frames, np.ndarray), is_uint8, tensor.device)

    def to_model(self, frames: Clip) -> Tensor:
        """To (n, 3, h, w) float32 in [-1, 1] on the CPU."""
        tensor = as_tensor(frames).cpu()
        # Contiguous, because convolutions round differently for other layouts.
        return normalise(tensor) if self.is_uint8 else tensor.contiguous().float() * 2.0 - 1.0

    def from_model(self, frames: Tensor) -> Clip:
        """The inverse, from (n, 3, h, w) float32 in [0, 1]."""
        frames = to_uint8(frames) if self.is_uint8 else frames
        return frames.numpy() if self.is_numpy else frames.to(self.device)
