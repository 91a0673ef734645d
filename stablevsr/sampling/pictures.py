"""Clips from the user's formats to the model's range, and back."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.errors import InputError

Clip = np.ndarray | Tensor


class Frames(Protocol):
    """The LR frames of a clip, in memory or not; each (3, h, w) in [-1, 1]. A tensor (n, 3, h, w) will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, frame: int) -> Tensor: ...


def as_tensor(frames: Clip) -> Tensor:
    """A clip as a tensor; `InputError` for numpy types that torch does not have."""
    if isinstance(frames, Tensor):
        return frames
    try:
        return torch.from_numpy(np.require(frames, requirements=["C", "W"]))  # flipped arrays and read-only ones too
    except TypeError as error:
        raise InputError(f"got frames of type {frames.dtype}, expected uint8 or float") from error


def normalise(frames: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 or uint16 to (n, 3, h, w) float32 in [-1, 1]."""
    half = torch.iinfo(frames.dtype).max / 2
    return rearrange(frames, "n h w c -> n c h w").contiguous().float() / half - 1.0


def in_model_range(picture: Tensor) -> Tensor:
    """(h, w, 3) uint8 or uint16, or (3, h, w) float in [0, 1], to (3, h, w) float32 in [-1, 1]."""
    if picture.is_floating_point():
        # Contiguous, because convolutions round differently for other layouts.
        return picture.contiguous().float() * 2.0 - 1.0
    return normalise(picture[None])[0]


@dataclass(frozen=True)
class PictureFormat:
    """How pictures are stored: (h, w, 3) uint8 or uint16 over the whole range, or (3, h, w) float32 in [0, 1]."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def shape(self, height: int, width: int, channels: int = 3) -> tuple[int, int, int]:
        """The shape of a picture."""
        return (channels, height, width) if self.dtype.is_floating_point else (height, width, channels)

    def encode(self, picture: Tensor) -> Tensor:
        """(1, c, h, w) float32 in [0, 1] to this format, rounded."""
        if self.dtype.is_floating_point:
            return picture[0]
        # 16 bits are scaled in float64: float32 would round a second time.
        levels = picture * 255.0 if self.dtype == torch.uint8 else picture.double() * 65535.0
        return rearrange(levels[0].round(), "c h w -> h w c").to(self.dtype)


def bicubic(low_res: Tensor) -> Tensor:
    """Bicubic upscaling by four, in any range: (n, c, h, w) to (n, c, 4h, 4w); it overshoots."""
    return F.interpolate(low_res, scale_factor=SCALE, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class ClipKind:
    """Type, format and size of a clip, so that the result can have the same type and format."""

    is_numpy: bool
    format: PictureFormat
    device: torch.device
    size: tuple[int, int]  # height, width

    def __str__(self) -> str:
        library = "numpy" if self.is_numpy else f"torch on {self.device}"
        return f"{self.size[1]}x{self.size[0]} {self.format.name} ({library})"

    @classmethod
    def of(cls, frames: Clip) -> "ClipKind":
        """Raises `InputError` for anything but (n, h, w, 3) uint8 and (n, 3, h, w) float in [0, 1]."""
        wanted = "expected (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1]"
        if not isinstance(frames, np.ndarray | Tensor):
            raise InputError(f"got frames of type {type(frames).__name__}, {wanted}, as a numpy array or torch tensor")
        tensor = as_tensor(frames)
        is_uint8 = tensor.dtype == torch.uint8
        shape = tuple(tensor.shape)
        fits = len(shape) == 4 and shape[3 if is_uint8 else 1] == 3 and min(shape) > 0
        if not fits or not (is_uint8 or tensor.is_floating_point()):
            raise InputError(f"got frames of shape {shape} and type {tensor.dtype}, {wanted}")
        if not is_uint8:
            low, high = tensor.min().item(), tensor.max().item()
            if not (low >= 0.0 and high <= 1.0):  # also for NaN
                raise InputError(f"got float frames between {low:g} and {high:g}, expected [0, 1]")
        size = (shape[1], shape[2]) if is_uint8 else (shape[2], shape[3])
        kind = PictureFormat(torch.uint8 if is_uint8 else torch.float32)
        return cls(isinstance(frames, np.ndarray), kind, tensor.device, size)

    def to_arrays(self, frames: Clip) -> Tensor:
        """The same clip as a tensor on the CPU."""
        return as_tensor(frames).cpu()

    def finish(self, pictures: Tensor) -> Clip:
        """Pictures in `format`, on the CPU, as a clip of this kind."""
        return pictures.numpy() if self.is_numpy else pictures.to(self.device)
