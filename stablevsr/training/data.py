"""Training samples: randomly cropped and flipped HR/LR windows, each a pure function of (seed, number)."""

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
    """Antialiased bicubic downscaling, clamped: (n, 3, 4h, 4w) in [0, 1] to (n, 3, h, w)."""
    size = (frames.shape[-2] // SCALE, frames.shape[-1] // SCALE)
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


class Windows(Dataset[Window], ABC):
    """Dataset of windows of n consecutive frames. Any number is a valid index; (seed, number) fixes every bit.

    A window holds `hr` (n, 3, crop, crop) and `lr` (n, 3, crop / 4, crop / 4), both in [-1, 1]. With ground-truth
    flow it also holds `flow` (n - 1, 2, crop, crop), in pixels, which warps frame i onto the grid of frame i + 1, and
    `valid` (n - 1, crop, crop), booleans, true where that flow is defined.
    """

    def __init__(self, seed: int, crop: int) -> None:
        self.seed = seed
        self.crop = crop

    @abstractmethod
    def clip(self, random: np.random.Generator) -> Window:
        """An uncropped window, frames in [0, 1]."""

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
    """Crops from a pool of clips; each clip is rendered on first use and cached as 8-bit frames."""

    def __init__(self, seed: int, crop: int, pool: int) -> None:
        super().__init__(seed, crop)
        self.pool = pool
        self.rendered: dict[int, Window] = {}

    @abstractmethod
    def render(self, index: int) -> Window:
        """Clip `index` of the pool: `hr` and `lr` as uint8, plus `flow` and `valid` if the dataset has flow."""

    def clip(self, random: np.random.Generator) -> Window:
        index = int(random.integers(self.pool))
        if index not in self.rendered:
            self.rendered[index] = self.render(index)
        window = self.rendered[index]
        return {**window, **{name: window[name].float() / 255 for name in ("hr", "lr")}}


class ProceduralWindows(PooledWindows):
    """Crops from procedural clips.

    Args:
        pool: number of distinct clips.
        side: side of a rendered clip, in HR pixels.
        num_frames: per window: 3 for the TCM, 2 for flow, 1 for single images.
        speed: scale of the motion, in pixels per frame.
        with_flow: also return the ground-truth flow.
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
    """Mix of two datasets with equal window shapes; a fraction `share` of the samples comes from the second."""

    def __init__(self, first: Windows, second: Windows, share: float) -> None:
        super().__init__(first.seed, first.crop)
        self.first, self.second, self.share = first, second, share

    def clip(self, random: np.random.Generator) -> Window:
        return (self.second if random.random() < self.share else self.first).clip(random)
