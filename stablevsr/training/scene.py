"""The things that procedural clips are made of: shapes with textures that move by smooth affine motions.

Coordinates are (x, y) in pixels with the origin in the middle of the picture; arrays of points are (..., 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Random = np.random.Generator
# (..., 2) object coordinates to booleans, or to (..., 3) colours in YCbCr
Mask = Callable[[Array], Array]
Texture = Callable[[Array], Array]

TILE = 256  # side of the periodic 1/f noise, in pixels


@dataclass(frozen=True)
class Motion:
    """A smooth affine motion: linear and sinusoidal in time, about the identity at time 0."""

    shift: Array  # (2,) pixels a frame
    sway: Array  # (2,) pixels, amplitude of a slow oscillation
    turn: float  # radians a frame
    zoom: float  # logarithm of the scale a frame
    phase: float

    @classmethod
    def draw(cls, random: Random, speed: float) -> "Motion":
        """Speeds have a long tail: most things hardly move, a few move fast. `speed` is the scale, pixels a frame."""
        return cls(
            shift=random.laplace(0, speed / 2, 2).clip(-4 * speed, 4 * speed),
            sway=random.normal(0, speed / 2, 2),
            turn=random.laplace(0, 0.004 * speed),
            zoom=random.laplace(0, 0.002 * speed),
            phase=random.uniform(0, 2 * np.pi),
        )

    def matrix(self, time: float) -> Array:
        """(3, 3), object to picture coordinates at `time`, in frames."""
        angle, scale = self.turn * time, np.exp(self.zoom * time)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        x, y = self.shift * time + self.sway * (np.sin(0.4 * time + self.phase) - np.sin(self.phase))
        return np.array([[cos, -sin, x], [sin, cos, y], [0, 0, 1]])


@dataclass(frozen=True)
class Layer:
    """One thing: a shape around its own origin, a texture, and where it is at time 0 and later."""

    radius: float  # the shape lies within this distance of the origin
    mask: Mask
    texture: Texture
    centre: Array  # (2,) at time 0
    motion: Motion

    def matrix(self, camera: Motion, time: float) -> Array:
        """(3, 3), object to picture coordinates."""
        place = np.eye(3)
        place[:2, 2] = self.centre
        return camera.matrix(time) @ place @ self.motion.matrix(time)


def transform(matrix: Array, points: Array) -> Array:
    """Affine (3, 3) matrix on (..., 2) points."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def noise_tile(random: Random) -> Array:
    """(TILE, TILE) periodic noise of unit variance, its amplitudes falling like 1/f, as in natural pictures."""
    fx, fy = np.fft.fftfreq(TILE)[None, :], np.fft.fftfreq(TILE)[:, None]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(random.standard_normal((TILE, TILE))) / frequency ** random.uniform(0.8, 1.4)
    tile = np.fft.ifft2(spectrum).real
    return tile / tile.std()


def _sample_tile(tile: Array, points: Array) -> Array:
    """Bilinear, periodic."""
    low = np.floor(points).astype(np.int64)
    x, y = np.moveaxis(points - low, -1, 0)
    i, j = low[..., 1] % TILE, low[..., 0] % TILE
    i1, j1 = (i + 1) % TILE, (j + 1) % TILE
    top = tile[i, j] * (1 - x) + tile[i, j1] * x
    bottom = tile[i1, j] * (1 - x) + tile[i1, j1] * x
    return top * (1 - y) + bottom * y


def draw_texture(random: Random, tiles: list[Array], tint: Array) -> Texture:
    """A base colour with a gradient, 1/f noise or a grating on it; mostly muted. `tint` (2,) is the scene's CbCr."""
    vivid = 0.13 if random.random() < 0.15 else 0.05
    base = np.array([random.uniform(0.08, 0.92), *(tint + random.normal(0, vivid, 2))])
    slope = random.normal(0, 0.002, (2, 3)) * [1, 0.25, 0.25]
    swing = np.array([1, *random.normal(0, 0.12, 2)])  # a pattern is mostly light and dark
    kind = random.choice(["noise", "grating", "plain"], p=[0.6, 0.2, 0.2])
    amount = random.gamma(2, 0.05)
    tile, offset, coarse = tiles[random.integers(len(tiles))], random.uniform(0, TILE, 2), random.uniform(0.3, 2)
    angle, period = random.uniform(0, np.pi), np.exp(random.uniform(np.log(3), np.log(40)))
    wave = 2 * np.pi / period * np.array([np.cos(angle), np.sin(angle)])
    sharpness = random.uniform(0.5, 4)

    def texture(points: Array) -> Array:
        colour = base + points @ slope
        if kind == "noise":
            colour = colour + amount * _sample_tile(tile, points * coarse + offset)[..., None] * swing
        elif kind == "grating":
            colour = colour + 1.5 * amount * np.tanh(sharpness * np.sin(points @ wave))[..., None] * swing
        return colour

    return texture


def draw_shape(random: Random, size: float, kind: str | None = None) -> Mask:
    """A shape of about `size` pixels radius, never beyond it: ellipse, convex polygon, or strokes like writing."""
    kind = kind or random.choice(["ellipse", "polygon", "strokes"], p=[0.4, 0.4, 0.2])
    if kind == "ellipse":
        axes, angle = size * random.uniform(0.35, 1, 2), random.uniform(0, np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return lambda points: (((points @ turn) / axes) ** 2).sum(-1) < 1
    if kind == "polygon":
        corners = np.sort(random.uniform(0, 2 * np.pi, random.integers(3, 7)))
        corners = size * np.stack([np.cos(corners), np.sin(corners)], -1)  # on a circle, so the polygon is convex
        edges = np.roll(corners, -1, axis=0) - corners
        normals = np.stack([edges[:, 1], -edges[:, 0]], -1)
        return lambda points: ((points[..., None, :] - corners) * normals).sum(-1).max(-1) < 0
    width = random.uniform(0.7, 1.0 + 0.08 * size)
    joints = random.uniform(-0.7, 0.7, (random.integers(3, 9), 2)) * (size - width)
    return lambda points: _distance_to_line(points, joints) < width


def _distance_to_line(points: Array, joints: Array) -> Array:
    """Distance of (..., 2) points to the line through `joints` (k, 2)."""
    nearest = np.full(points.shape[:-1], np.inf)
    for start, end in zip(joints, joints[1:], strict=False):
        along = end - start
        part = ((points - start) @ along / max(along @ along, 1e-9)).clip(0, 1)
        nearest = np.minimum(nearest, ((points - start - part[..., None] * along) ** 2).sum(-1))
    return np.sqrt(nearest)
