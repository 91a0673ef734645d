"""Clips made from photographs: crops that move by smooth homographies, with a piece of another one moving in front.

Natural texture with exact flow and occlusion, from a folder of pictures that are much larger than the crops.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stablevsr.errors import InputError
from stablevsr.media import natural_key
from stablevsr.training.data import PooledWindows, Window, downscale
from stablevsr.training.degradations import degrade
from stablevsr.training.procedural import SUPERSAMPLING, pixel_centres
from stablevsr.training.scene import Array, Mask, Motion, Random, draw_shape, transform

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
REDUCTION = (1.6, 4.5)  # pixels of a photograph to one of a clip: below, its demosaicing and JPEG artefacts show
MARGIN = 1.15  # of the clip's side that the camera may see, where a small photograph bounds the reduction
FRONT = 0.7  # share of windows in which something moves in front
TILT = 5e-5  # a frame and unit of speed: how fast planes turn out of the picture, per pixel
KEPT = 24  # decoded photographs held in memory
STILL = Motion(np.zeros(2), np.zeros(2), 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Plane:
    """A photograph in motion: where it is in the clip at any time, and which part of it."""

    camera: Motion
    own: Motion
    tilt: Array  # (2,) a frame
    place: Array  # (2,) clip pixels, at time 0
    mask: Mask | None  # None covers everything
    turn: Array  # (2, 2), plane coordinates in clip pixels to pixels of the photograph

    def matrix(self, time: float) -> Array:
        """(3, 3) homography, plane to clip coordinates."""
        place, tilt = np.eye(3), np.eye(3)
        place[:2, 2] = self.place
        tilt[2, :2] = self.tilt * time
        return self.camera.matrix(time) @ place @ self.own.matrix(time) @ tilt

    def on_plane(self, points: Array, time: float) -> Array:
        """(..., 2) clip coordinates at `time` to plane coordinates."""
        return project(np.linalg.inv(self.matrix(time)), points)

    def seen(self, points: Array, time: float) -> Array:
        """Where the plane covers (..., 2) clip coordinates, as booleans."""
        if self.mask is None:
            return np.ones(points.shape[:-1], bool)
        return self.mask(self.on_plane(points, time))


@dataclass(frozen=True)
class PhotoClips:
    """What clips are made of photographs."""

    num_frames: int
    side: int  # of a clip, in pixels
    speed: float = 3.0  # scale of the motions in pixels a frame
    with_flow: bool = False
    degraded: float = 0.0  # share of clips whose LR frames are degraded (`training/degradations.py`)


class PhotoWindows(PooledWindows):
    """Crops of clips that are made of photographs.

    Args:
        root: the folder of photographs; those below it are not looked at.
        include, exclude: names of files, without their suffixes; without `include` all but the excluded are taken.

    Raises:
        UserError: for folders that are missing or empty; while reading, for pictures that cannot be read or are too
            small.
    """

    def __init__(
        self,
        seed: int,
        crop: int,
        pool: int,
        clips: PhotoClips,
        root: Path,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        super().__init__(seed, crop, pool)
        self.clips, self.side = clips, clips.side
        self.files = _photographs(root, include, exclude)
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def render(self, index: int) -> Window:
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, index, 3]))
        camera = Motion.draw(random, self.clips.speed)
        planes, photographs = [], []
        if random.random() < FRONT:
            planes.append(self._front(random, camera))
            photographs.append(int(random.integers(len(self.files))))
        ground = int(random.integers(len(self.files)))
        planes.append(Plane(camera, STILL, self._tilt(random), np.zeros(2), None, self._turn(random, ground)))
        photographs.append(ground)
        window = self._window(planes, photographs, random)
        hr = (window["hr"] * 255).round()
        lr = degrade(hr / 255, random) if random.random() < self.clips.degraded else downscale(hr / 255)
        return window | {"hr": hr.to(torch.uint8), "lr": (lr * 255).round().to(torch.uint8)}

    def _tilt(self, random: Random) -> Array:
        return random.laplace(0, TILT * self.clips.speed, 2)

    def _front(self, random: Random, camera: Motion) -> Plane:
        radius, place = self.side * random.uniform(0.1, 0.35), self.side * random.uniform(-0.4, 0.4, 2)
        own, tilt = Motion.draw(random, self.clips.speed), self._tilt(random)
        reduction = np.exp(random.uniform(*np.log(REDUCTION)))
        return Plane(camera, own, tilt, place, draw_shape(random, radius), reduction * np.eye(2))

    def _turn(self, random: Random, photograph: int) -> Array:
        """A reduction in size that the photograph is large enough for, and at random a quarter turn."""
        shorter = min(self._photograph(photograph).shape[:2])
        most = max(min(REDUCTION[1], shorter / (MARGIN * self.side)), 1.0)
        reduction = np.exp(random.uniform(np.log(min(REDUCTION[0], most)), np.log(most)))
        return reduction * np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), int(random.integers(4)))

    def _window(self, planes: list[Plane], photographs: list[int], random: Random) -> Window:
        points = pixel_centres(self.side, self.side, SUPERSAMPLING)
        times = range(self.clips.num_frames)
        colours = [
            self._colours(photograph, [plane.on_plane(points, time) @ plane.turn.T for time in times], random)
            for plane, photograph in zip(planes, photographs, strict=True)
        ]
        frames = []
        for time in times:
            owner = _owner(planes, points, time)
            frame = colours[-1][time]
            for number in range(len(planes) - 1):
                frame = torch.where(torch.from_numpy(owner == number), colours[number][time], frame)
            frames.append(F.avg_pool2d(frame, SUPERSAMPLING))
        window = {"hr": torch.stack(frames)}
        if self.clips.with_flow:
            pairs = [_flow(planes, self.side, time + 1, time) for time in times[:-1]]
            window["flow"] = torch.stack([torch.from_numpy(flow).float().permute(2, 0, 1) for flow, _ in pairs])
            window["valid"] = ~torch.stack([torch.from_numpy(hidden) for _, hidden in pairs])
        return window

    def _colours(self, number: int, points: list[Array], random: Random) -> list[Tensor]:
        """A photograph sampled at (rows, columns, 2) pixels about a random place: (3, rows, columns) in [0, 1] each.

        The place lets all points lie inside, if the photograph is large enough; else its border is repeated.
        """
        photograph = self._photograph(number)
        size = np.array(photograph.shape[1::-1])
        low = np.min([p.min((0, 1)) for p in points], axis=0)
        high = np.max([p.max((0, 1)) for p in points], axis=0)
        centre = random.uniform(np.minimum(1 - low, size / 2), np.maximum(size - 2 - high, size / 2))
        first = np.clip(np.floor(centre + low).astype(int) - 1, 0, size - 2)
        last = np.clip(np.ceil(centre + high).astype(int) + 2, first + 2, size)
        part = photograph[first[1] : last[1], first[0] : last[0]].permute(2, 0, 1)[None].float() / 255
        scale = 2 / (last - first)
        return [_sample(part, (p + centre - first + 0.5) * scale - 1) for p in points]

    def _photograph(self, number: int) -> Tensor:
        """(h, w, 3) uint8; the latest few stay in memory."""
        if number not in self._kept:
            self._kept[number] = _read(self.files[number], self.side)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


def project(matrix: Array, points: Array) -> Array:
    """Homography (3, 3) on (..., 2) points."""
    return transform(matrix, points) / (points @ matrix[2, :2] + matrix[2, 2])[..., None]


def _owner(planes: list[Plane], points: Array, time: float) -> Array:
    """The index of the plane seen at (rows, columns, 2) clip coordinates; the last covers everything."""
    owner = np.full(points.shape[:-1], len(planes) - 1)
    for number in range(len(planes) - 2, -1, -1):
        owner[planes[number].seen(points, time)] = number
    return owner


def _flow(planes: list[Plane], side: int, target: float, source: float) -> tuple[Array, Array]:
    """As `Scene.flow`: (side, side, 2) in pixels, and booleans where the source does not show the thing."""
    points = pixel_centres(side, side, 1)
    owner = _owner(planes, points, target)
    there = np.empty_like(points)
    for number in np.unique(owner):
        step = planes[number].matrix(source) @ np.linalg.inv(planes[number].matrix(target))
        there[owner == number] = project(step, points[owner == number])
    outside = (np.abs(there) > (side - 1) / 2).any(-1)
    return there - points, outside | (_owner(planes, there, source) != owner)


def _sample(picture: Tensor, grid: Array) -> Tensor:
    """Bilinear: (1, 3, h, w) at (rows, columns, 2) in [-1, 1]."""
    where = torch.from_numpy(grid).float()[None]
    return F.grid_sample(picture, where, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _photographs(root: Path, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[Path]:
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist, expected a folder of photographs")
    there = {path.stem: path for path in root.iterdir() if path.suffix.lower() in SUFFIXES}
    missing = sorted(set(include) - set(there))
    if missing:
        raise InputError(f"data folder {root} has no picture {missing[0]}, which the recipe includes")
    names = include or [name for name in there if name not in exclude]
    if not names:
        raise InputError(f"data folder {root} holds no picture that the recipe takes, expected {', '.join(SUFFIXES)}")
    return [there[name] for name in sorted(names, key=natural_key)]


def _read(path: Path, side: int) -> Tensor:
    """(h, w, 3) uint8."""
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    except Exception as error:  # the decoders raise many types for damaged files
        raise InputError(f"photograph {path} cannot be read ({error})") from error
    height, width = pixels.shape[:2]
    if min(height, width) < MARGIN * side:
        raise InputError(f"{path} is {width}x{height}, expected sides of at least {MARGIN * side:.0f}: use larger ones")
    return pixels
