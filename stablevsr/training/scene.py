"""Building blocks of procedural clips: textured shapes that move by smooth affine motions.

Coordinates are (x, y) in pixels with the origin at the image centre; arrays of points are (..., 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Random = np.random.Generator
# Functions of (..., 2) object coordinates: a mask gives booleans (...), a texture gives YCbCr (..., 3).
Mask = Callable[[Array], Array]
Texture = Callable[[Array], Array]

TILE = 256  # side of the periodic 1/f noise, in pixels


@dataclass(frozen=True)
class Motion:
    """A smooth affine motion: a linear and a sinusoidal term in time; the identity at time 0."""

    shift: Array  # (2,) pixels per frame
    sway: Array  # (2,) amplitude of a slow oscillation, in pixels
    turn: float  # radians per frame
    zoom: float  # log scale per frame
    phase: float  # of the oscillation, in radians

    @classmethod
    def draw(cls, random: Random, speed: float) -> "Motion":
        """Draw a motion with long-tailed speed: mostly slow, rarely fast; `speed` is the scale, in pixels per frame."""
        return cls(
            shift=random.laplace(0, speed / 2, 2).clip(-4 * speed, 4 * speed),
            sway=random.normal(0, speed / 2, 2),
            turn=random.laplace(0, 0.004 * speed),
            zoom=random.laplace(0, 0.002 * speed),
            phase=random.uniform(0, 2 * np.pi),
        )

    def matrix(self, time: float) -> Array:
        """(3, 3), object to image coordinates at `time`, in frames."""
        angle, scale = self.turn * time, np.exp(self.zoom * time)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        x, y = self.shift * time + self.sway * (np.sin(0.4 * time + self.phase) - np.sin(self.phase))
        return np.array([[cos, -sin, x], [sin, cos, y], [0, 0, 1]])


@dataclass(frozen=True)
class Layer:
    """A textured shape around its own origin, with its position and motion."""

    radius: float  # the shape lies within this distance of the origin
    mask: Mask
    texture: Texture
    centre: Array  # (2,) at time 0
    motion: Motion

    def matrix(self, camera: Motion, time: float) -> Array:
        """(3, 3), object to image coordinates at `time`, in frames."""
        place = np.eye(3)
        place[:2, 2] = self.centre
        return camera.matrix(time) @ place @ self.motion.matrix(time)


def transform(matrix: Array, points: Array) -> Array:
    """Apply an affine (3, 3) matrix to (..., 2) points."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def noise_tile(random: Random) -> Array:
    """(TILE, TILE) periodic noise of unit variance with amplitudes of about 1/f, as in natural images."""
    fx, fy = np.fft.fftfreq(TILE)[None, :], np.fft.fftfreq(TILE)[:, None]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(random.standard_normal((TILE, TILE))) / frequency ** random.uniform(0.8, 1.4)
    tile = np.fft.ifft2(spectrum).real
    return tile / tile.std()


def _sample_tile(tile: Array, points: Array) -> Array:
    """Periodic bilinear sampling of a (TILE, TILE) tile at (..., 2) points: (...)."""
    low = np.floor(points).astype(np.int64)
    x, y = np.moveaxis(points - low, -1, 0)
    i, j = low[..., 1] % TILE, low[..., 0] % TILE
    i1, j1 = (i + 1) % TILE, (j + 1) % TILE
    top = tile[i, j] * (1 - x) + tile[i, j1] * x
    bottom = tile[i1, j] * (1 - x) + tile[i1, j1] * x
    return top * (1 - y) + bottom * y


def draw_texture(random: Random, tiles: list[Array], tint: Array) -> Texture:
    """A base colour and gradient, plus 1/f noise, a grating or neither; mostly muted. `tint` (2,): the scene's CbCr."""
    vivid = 0.13 if random.random() < 0.15 else 0.05
    base = np.array([random.uniform(0.08, 0.92), *(tint + random.normal(0, vivid, 2))])
    slope = random.normal(0, 0.002, (2, 3)) * [1, 0.25, 0.25]
    swing = np.array([1, *random.normal(0, 0.12, 2)])  # patterns vary mostly in luma
    kind = random.choice(["noise", "grating", "plain"], p=[0.6, 0.2, 0.2])
    amount = random.gamma(2, 0.05)
    tile, offset, coarse = tiles[random.integers(len(tiles))], random.uniform(0, TILE, 2), random.uniform(0.3, 2)
    angle, period = random.uniform(0, np.pi), np.exp(random.uniform(np.log(3), np.log(40)))
    wave = 2 * np.pi / period * np.array([np.cos(angle), np.sin(angle)])
    sharpness = random.uniform(0.5, 4)

    def texture(points: Array) -> Array:
        color = base + points @ slope
        if kind == "noise":
            color = color + amount * _sample_tile(tile, points * coarse + offset)[..., None] * swing
        elif kind == "grating":
            color = color + 1.5 * amount * np.tanh(sharpness * np.sin(points @ wave))[..., None] * swing
        return color

    return texture


def draw_shape(random: Random, size: float, kind: str | None = None) -> Mask:
    """A random shape within a radius of `size` pixels: an ellipse, a convex polygon, or strokes like handwriting."""
    kind = kind or str(random.choice(["ellipse", "polygon", "strokes"], p=[0.4, 0.4, 0.2]))
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
    """Distance from (..., 2) points to the polyline `joints` (k, 2): (...)."""
    nearest = np.full(points.shape[:-1], np.inf)
    for start, end in zip(joints, joints[1:], strict=False):
        along = end - start
        part = ((points - start) @ along / max(along @ along, 1e-9)).clip(0, 1)
        nearest = np.minimum(nearest, ((points - start - part[..., None] * along) ** 2).sum(-1))
    return np.sqrt(nearest)
