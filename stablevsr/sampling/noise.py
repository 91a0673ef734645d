"""Noise sources. The sampler draws nothing itself: it asks a source for the noise of (step, frame)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stablevsr.errors import OptionsError


class NoiseSource(Protocol):
    """Any object with these two methods; frames in display order, whatever the direction of the pass.

    For models that noise the LR frame it must be a `LowResNoise`.
    """

    def initial(self, frame: int) -> Tensor:
        """The unit Gaussian noise that the frame starts from, (latent channels, h, w) float32."""
        ...

    def step(self, index: int, frame: int) -> Tensor:
        """The noise added to the frame in step `index`, the same shape."""
        ...


@runtime_checkable
class LowResNoise(NoiseSource, Protocol):
    """A source that also has noise for the LR frames."""

    def low_res(self, frame: int) -> Tensor:
        """Noise for the LR frame itself, (3, h, w) float32."""
        ...


def as_draw(value: object, shape: tuple[int, ...], what: str) -> Tensor:
    """A draw of a source as a float32 tensor; `OptionsError` unless it has this shape."""
    draw = torch.as_tensor(value).float()
    if tuple(draw.shape) != tuple(shape):
        raise OptionsError(f"got noise of shape {tuple(draw.shape)} for {what}, expected {tuple(shape)}")
    return draw


@dataclass(frozen=True)
class SeededNoise:
    """Draws that are a pure function of (seed, frame, step): the same in any order or batch, on any device.

    Philox is counter-based: frame and step are part of its counter, so every draw has a stream of its own.
    """

    seed: int
    shape: tuple[int, int, int]  # latent channels, h, w

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int | np.integer) or not 0 <= self.seed < 2**64:
            raise OptionsError(f"got seed {self.seed}, expected 0 to 2^64 - 1")

    def initial(self, frame: int) -> Tensor:
        return self._draw(0, frame, self.shape)

    def step(self, index: int, frame: int) -> Tensor:
        return self._draw(2 + index, frame, self.shape)

    def low_res(self, frame: int) -> Tensor:
        """Noise for the LR frame itself, (3, h, w)."""
        return self._draw(1, frame, (3, *self.shape[1:]))

    def _draw(self, purpose: int, frame: int, shape: tuple[int, ...]) -> Tensor:
        # Philox itself uses the low two words of the counter, and advances them by one for every four numbers.
        bits = np.random.Philox(key=self.seed, counter=[0, 0, frame, purpose])
        return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class RecordedNoise:
    """Replays noise recorded elsewhere."""

    initial_noise: Tensor  # (n, latent channels, h, w)
    step_noise: Tensor  # (steps, n, latent channels, h, w)

    def initial(self, frame: int) -> Tensor:
        return self.initial_noise[frame]

    def step(self, index: int, frame: int) -> Tensor:
        return self.step_noise[index, frame]
