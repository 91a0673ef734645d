"""Windows of three frames with their LR counterparts: cropped and flipped, each a pure function of (seed, number)."""

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from stablevsr.config import SCALE
from stablevsr.training.procedural import render_clip

Window = dict[str, Tensor]  # see `Windows`


def downscale(frames: Tensor) -> Tensor:
    """(n, 3, 4h, 4w) in [0, 1] to (n, 3, h, w): antialiased bicubic, clamped."""
    size = (frames.shape[-2] // SCALE, frames.shape[-1] // SCALE)
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


class Windows(Dataset[Window], ABC):
    """Training samples by number. Any number is legal; the same (seed, number) gives the same bits.

    A window holds `hr` (n, 3, crop, crop) and `lr` (n, 3, crop / 4, crop / 4), both in [-1, 1], and where the truth
    is known `flow` (n - 1, 2, crop, crop), which fetches frame i onto the grid of frame i + 1, in pixels, and
    `valid` (n - 1, crop, crop), where it holds.
    """

    def __init__(self, seed: int, crop: int) -> None:
        self.seed = seed
        self.crop = crop

    @abstractmethod
    def clip(self, random: np.random.Generator) -> Window:
        """A whole window, uncropped, pictures in [0, 1]."""

    def __getitem__(self, number: int) -> Window:
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, number, 1]))
        window = self.clip(random)
        height, width = window["lr"].shape[-2:]
        size = self.crop // SCALE
        top, left = random.integers(height - size + 1), random.integers(width - size + 1)
        flip = bool(random.integers(2))
        return {name: self._cut(name, value, int(top), int(left), flip) for name, value in window.items()}

    def _cut(self, name: str, value: Tensor, top: int, left: int, flip: bool) -> Tensor:
        scale = 1 if name == "lr" else SCALE
        top, left, size = top * scale, left * scale, self.crop // SCALE * scale
        value = value[..., top : top + size, left : left + size]
        if flip:
            value = value.flip(-1)
        if name == "flow" and flip:
            value = value * torch.tensor([-1.0, 1.0])[:, None, None]
        return value * 2 - 1 if name in ("hr", "lr") else value


class PooledWindows(Windows):
    """Crops of a pool of clips, each rendered when it is first needed and kept with 8 bits, as pictures are."""

    def __init__(self, seed: int, crop: int, pool: int) -> None:
        super().__init__(seed, crop)
        self.pool = pool
        self.rendered: dict[int, Window] = {}

    @abstractmethod
    def render(self, index: int) -> Window:
        """Clip `index` of the pool: `hr` and `lr` as uint8, `flow` and `valid` if wanted."""

    def clip(self, random: np.random.Generator) -> Window:
        index = int(random.integers(self.pool))
        if index not in self.rendered:
            self.rendered[index] = self.render(index)
        window = self.rendered[index]
        return {**window, **{name: window[name].float() / 255 for name in ("hr", "lr")}}


class ProceduralWindows(PooledWindows):
    """Crops of procedural clips.

    Args:
        num_frames: 3 for the TCM, 2 for flow, 1 for single pictures.
        with_flow: give the true flow as well.
    """

    def __init__(
        self, seed: int, crop: int, pool: int, side: int, num_frames: int, speed: float, with_flow: bool
    ) -> None:
        super().__init__(seed, crop, pool)
        self.side, self.speed = side, speed
        self.num_frames, self.with_flow = num_frames, with_flow

    def render(self, index: int) -> Window:
        clip = render_clip(self.seed, index, self.num_frames, self.side, self.side, self.speed, self.with_flow)
        hr = (clip.frames * 255).round()
        lr = (downscale(hr / 255) * 255).round()
        window = {"hr": hr.to(torch.uint8), "lr": lr.to(torch.uint8)}
        if self.with_flow:
            window |= {"flow": clip.forward, "valid": ~clip.forward_occluded}
        return window


class MixedWindows(Windows):
    """Windows of two kinds, of the same frames and crop; `share` of the numbers are the second kind's."""

    def __init__(self, first: Windows, second: Windows, share: float) -> None:
        super().__init__(first.seed, first.crop)
        self.first, self.second, self.share = first, second, share

    def clip(self, random: np.random.Generator) -> Window:
        return (self.second if random.random() < self.share else self.first).clip(random)
