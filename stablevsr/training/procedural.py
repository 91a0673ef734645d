"""Procedural clips: moving dead leaves (Lee, Mumford and Huang 2001) with exact flow and occlusion."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stablevsr.training.scene import Array, Layer, Motion, Random, draw_shape, draw_texture, noise_tile, transform

SUPERSAMPLING = 2  # samples per pixel and axis, for antialiasing
YCBCR_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])  # BT.601, full range


@dataclass(frozen=True)
class RenderedClip:
    """A clip of n frames with its ground truth. Entry i of flows and masks belongs to the pair (i, i + 1)."""

    frames: Tensor  # (n, 3, h, w) float32 in [0, 1]
    forward: Tensor  # (n - 1, 2, h, w) float32, pixels: warps frame i onto the grid of frame i + 1
    backward: Tensor  # (n - 1, 2, h, w) float32, pixels: warps frame i + 1 onto the grid of frame i
    forward_occluded: Tensor  # (n - 1, h, w) bool: pixels of frame i + 1 that are not visible in frame i
    backward_occluded: Tensor  # (n - 1, h, w) bool: pixels of frame i that are not visible in frame i + 1


@dataclass(frozen=True)
class Scene:
    """Layers, front to back, seen by a moving camera; the last layer covers everything.

    Leaf radii follow the power law r^-3, which makes image statistics scale-invariant.
    """

    camera: Motion
    layers: list[Layer]
    grain: float  # standard deviation of the per-frame noise
    random: Random = field(repr=False)  # its remaining stream draws the grain

    @classmethod
    def draw(cls, seed: int, index: int, side: int, speed: float = 3.0, num_leaves: int = 200) -> "Scene":
        """Scene `index` of `seed`, for frames of about `side` pixels."""
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, 0]))
        tiles = [noise_tile(random) for _ in range(3)]
        tint = random.normal(0, 0.04, 2)
        layers = []
        for _ in range(num_leaves):
            # Inverse transform sampling of r^-3 between the smallest and the largest radius.
            smallest, largest = random.choice([1.5, 3.0, 0.08 * side]), 0.5 * side
            size = (smallest**-2 - random.random() * (smallest**-2 - largest**-2)) ** -0.5
            layers.append(
                Layer(
                    radius=size,
                    mask=draw_shape(random, size),
                    texture=draw_texture(random, tiles, tint),
                    centre=random.uniform(-0.7, 0.7, 2) * side,
                    motion=Motion.draw(random, speed),
                )
            )
        still = Motion(np.zeros(2), np.zeros(2), 0.0, 0.0, 0.0)
        ground = draw_texture(random, tiles, tint)
        layers.append(Layer(np.inf, lambda points: np.ones(points.shape[:-1], bool), ground, np.zeros(2), still))
        return cls(Motion.draw(random, speed), layers, random.exponential(0.006), random)

    def top_layer(self, points: Array, time: float) -> Array:
        """Index of the layer visible at (rows, columns, 2) image coordinates."""
        ground = len(self.layers) - 1
        owner = np.full(points.shape[:-1], ground)
        lowest, highest = points[..., 1].min(-1), points[..., 1].max(-1)  # y range per row: most layers miss most rows
        for number, layer in enumerate(self.layers[:-1]):
            matrix = layer.matrix(self.camera, time)
            x, y = matrix[:2, 2]
            reach = layer.radius * np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
            rows = np.flatnonzero((lowest < y + reach) & (highest > y - reach))
            row, column = np.nonzero((owner[rows] == ground) & (np.abs(points[rows, :, 0] - x) < reach))
            near = rows[row], column
            hit = layer.mask(transform(np.linalg.inv(matrix), points[near]))
            owner[near[0][hit], near[1][hit]] = number
        return owner

    def render(self, height: int, width: int, time: float) -> Array:
        """Render one frame: (height, width, 3) RGB in [0, 1]."""
        points = pixel_centres(height, width, SUPERSAMPLING)
        owner = self.top_layer(points, time)
        color = np.empty((*owner.shape, 3))
        for number in np.unique(owner):
            layer = self.layers[number]
            seen = owner == number
            inverse = np.linalg.inv(layer.matrix(self.camera, time))
            color[seen] = layer.texture(transform(inverse, points[seen]))
        rgb = (color @ YCBCR_TO_RGB.T).clip(0, 1)
        rgb = rgb.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).mean((1, 3))
        return (rgb + self.random.normal(0, self.grain, rgb.shape)).clip(0, 1)

    def flow(self, height: int, width: int, target: float, source: float) -> tuple[Array, Array]:
        """Ground-truth flow from frame `target` to frame `source`, and its occlusion mask.

        Returns:
            (height, width, 2) flow in pixels on the grid of `target`, and (height, width) booleans, true where the
            point is occluded in `source` or outside the frame.
        """
        points = pixel_centres(height, width, 1)
        owner = self.top_layer(points, target)
        warped = np.empty_like(points)
        for number in np.unique(owner):
            layer = self.layers[number]
            step = layer.matrix(self.camera, source) @ np.linalg.inv(layer.matrix(self.camera, target))
            warped[owner == number] = transform(step, points[owner == number])
        outside = (np.abs(warped) > [(width - 1) / 2, (height - 1) / 2]).any(-1)
        return warped - points, outside | (self.top_layer(warped, source) != owner)


def pixel_centres(height: int, width: int, per_pixel: int) -> Array:
    """(height * per_pixel, width * per_pixel, 2) coordinates (x, y), with the origin at the image centre."""
    y, x = ((np.arange(n * per_pixel) + 0.5) / per_pixel - n / 2 for n in (height, width))
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)


def render_clip(
    seed: int, index: int, num_frames: int, height: int, width: int, speed: float = 3.0, with_flow: bool = True
) -> RenderedClip:
    """Render procedural clip `index` of `seed`; equal arguments give equal bits.

    Args:
        num_frames, height, width: of the clip, in HR pixels.
        speed: scale of the motion, in pixels per frame; a few layers move up to four times as fast.
        with_flow: if false, flows and masks are empty, which saves time.
    """
    return render_scene(Scene.draw(seed, index, max(height, width), speed), num_frames, height, width, with_flow)


def render_scene(scene: Scene, num_frames: int, height: int, width: int, with_flow: bool = True) -> RenderedClip:
    """Render the first frames of a scene with their ground truth; arguments as in `render_clip`."""
    frames = np.stack([scene.render(height, width, time) for time in range(num_frames)])
    pairs = range(num_frames - 1 if with_flow else 0)
    forward = [scene.flow(height, width, target=i + 1, source=i) for i in pairs]
    backward = [scene.flow(height, width, target=i, source=i + 1) for i in pairs]

    def flows(found: list[tuple[Array, Array]]) -> tuple[Tensor, Tensor]:
        flow = np.stack([f for f, _ in found]) if found else np.empty((0, height, width, 2))
        hidden = np.stack([o for _, o in found]) if found else np.empty((0, height, width), bool)
        return torch.from_numpy(flow).float().permute(0, 3, 1, 2).contiguous(), torch.from_numpy(hidden)

    (forward_flow, forward_occluded), (backward_flow, backward_occluded) = flows(forward), flows(backward)
    picture = torch.from_numpy(frames).float().permute(0, 3, 1, 2).contiguous()
    return RenderedClip(picture, forward_flow, backward_flow, forward_occluded, backward_occluded)
