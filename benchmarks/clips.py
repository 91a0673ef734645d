"""Held-out clips with exact flow: photographs in motion, and procedural scenes with a seed not used in training.

The photographs come with the scikit-image package (`pip install '.[bench]'`); nothing here was seen in training.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor

from stablevsr.training.procedural import YCBCR_TO_RGB, RenderedClip, Scene, render_clip, render_scene
from stablevsr.training.scene import Layer, Motion, Random, Texture, draw_shape

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
HELD_OUT_SEED = 1_000_003
MARGIN = 1.15  # how far the camera may see beyond the first frame, before the border is repeated


class HeldOutClip(NamedTuple):
    """A clip of real or procedural content."""

    name: str
    is_photograph: bool
    truth: RenderedClip


def photograph(name: str) -> Tensor:
    """One of PHOTOGRAPHS, (3, h, w) in [0, 1]."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        sys.exit("the photographs come with scikit-image: pip install '.[bench]'")
    picture = np.asarray(iio.imread(Path(package.origin).parent / "data" / name, plugin="pillow", mode="RGB"))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


def photograph_texture(picture: Tensor, scale: float) -> Texture:
    """A photograph as the texture of a layer, `scale` of its pixels to one of the clip."""
    pixels = picture.permute(1, 2, 0).double().numpy() @ np.linalg.inv(YCBCR_TO_RGB).T
    height, width = pixels.shape[:2]

    def texture(points: np.ndarray) -> np.ndarray:
        x = (points[..., 0] * scale + (width - 1) / 2).clip(0, width - 1)
        y = (points[..., 1] * scale + (height - 1) / 2).clip(0, height - 1)
        j, i = x.astype(int).clip(max=width - 2), y.astype(int).clip(max=height - 2)
        x, y = (x - j)[..., None], (y - i)[..., None]
        top = pixels[i, j] * (1 - x) + pixels[i, j + 1] * x
        bottom = pixels[i + 1, j] * (1 - x) + pixels[i + 1, j + 1] * x
        return top * (1 - y) + bottom * y

    return texture


def photograph_clip(index: int, num_frames: int, side: int) -> RenderedClip:
    """Photograph `index` under a smooth camera, with a piece of the next one moving in front."""
    random: Random = np.random.Generator(np.random.Philox(key=HELD_OUT_SEED, counter=[0, 0, index, 2]))
    ground, front = (photograph(PHOTOGRAPHS[i % len(PHOTOGRAPHS)]) for i in (index, index + 1))

    def texture(picture: Tensor) -> Texture:
        # At a scale of two, each supersample of the renderer hits one pixel: the sharpest possible picture.
        return photograph_texture(picture, min(2.0, min(picture.shape[-2:]) / (MARGIN * side)))

    still = Motion(np.zeros(2), np.zeros(2), 0.0, 0.0, 0.0)
    radius = 0.2 * side
    layers = [
        Layer(
            radius,
            draw_shape(random, radius, "ellipse"),
            texture(front),
            random.uniform(-0.25, 0.25, 2) * side,
            Motion.draw(random, 2.0),
        ),
        Layer(np.inf, lambda points: np.ones(points.shape[:-1], bool), texture(ground), np.zeros(2), still),
    ]
    return render_scene(Scene(Motion.draw(random, 2.0), layers, 0.0, random), num_frames, side, side)


def held_out_clips(num_frames: int, side: int, num_procedural: int) -> Iterator[HeldOutClip]:
    """All photographs, then some procedural scenes; each (num_frames, 3, side, side)."""
    for index, name in enumerate(PHOTOGRAPHS):
        yield HeldOutClip(Path(name).stem, True, photograph_clip(index, num_frames, side))
    for index in range(num_procedural):
        truth = render_clip(HELD_OUT_SEED, index, num_frames, side, side, speed=2.0)
        yield HeldOutClip(f"procedural {index}", False, truth)
