"""Clips from photographs: crops moving by smooth homographies, often with a cut-out of another one in front.

This gives natural texture with exact flow and occlusion from a folder of photographs much larger than the crops.
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
REDUCTION = (1.6, 9.0)  # photograph pixels per clip pixel; lower values show demosaicing and JPEG artefacts
DENSEST = 2.8  # most pixels of a (halved) photograph per clip pixel: SUPERSAMPLING would alias beyond
CANDIDATES = 2  # random places in a photograph, of which the one with the most detail is used: much of any is flat
MARGIN = 1.15  # minimum side of a reduced photograph, relative to the clip's side: room for motion
FRONT = 0.7  # share of clips with a moving foreground
TILT = 5e-5  # perspective term of the homography, per frame and unit of speed
CACHE = 3 * 2**30  # bytes of decoded and halved photographs to keep in memory
LEAD = 4  # a degraded clip begins up to LEAD - 1 frames before its window, as a codec predicts from earlier frames
STILL = Motion(np.zeros(2), np.zeros(2), 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Plane:
    """A moving photograph: its pose in the clip at any time, and its mask."""

    camera: Motion
    own: Motion
    tilt: Array  # (2,) per frame
    place: Array  # (2,) position at time 0, in clip pixels
    mask: Mask | None  # None: covers the whole clip
    turn: Array  # (2, 2), plane coordinates (clip pixels) to photograph pixels

    def matrix(self, time: float) -> Array:
        """(3, 3) homography from plane to clip coordinates."""
        place, tilt = np.eye(3), np.eye(3)
        place[:2, 2] = self.place
        tilt[2, :2] = self.tilt * time
        return self.camera.matrix(time) @ place @ self.own.matrix(time) @ tilt

    def on_plane(self, points: Array, time: float) -> Array:
        """(..., 2) clip coordinates at `time` to plane coordinates."""
        return project(np.linalg.inv(self.matrix(time)), points)

    def seen(self, points: Array, time: float) -> Array:
        """Booleans (...): where the plane covers (..., 2) clip coordinates."""
        if self.mask is None:
            return np.ones(points.shape[:-1], bool)
        return self.mask(self.on_plane(points, time))


@dataclass(frozen=True)
class PhotoClips:
    """Settings of clips rendered from photographs."""

    num_frames: int
    side: int  # of a clip, in HR pixels
    speed: float = 3.0  # scale of the motion, in pixels per frame
    with_flow: bool = False
    degraded: float = 0.0  # share of clips whose LR frames are degraded (`training/degradations.py`)


class PhotoWindows(PooledWindows):
    """Crops from clips rendered from photographs.

    Args:
        root: the folder of photographs; subfolders are ignored.
        include, exclude: file names without suffix; an empty `include` means all photographs except `exclude`.

    Raises:
        UserError: if the folder is missing or empty; when a clip is rendered, if a photograph cannot be decoded or is
            too small.
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
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def render(self, index: int) -> Window:
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, index, 3]))
        camera = Motion.draw(random, self.clips.speed)
        planes, photographs = [], []
        if random.random() < FRONT:
            photographs.append(int(random.integers(len(self.files))))
            planes.append(self._front(random, camera, photographs[0]))
        ground = int(random.integers(len(self.files)))
        planes.append(Plane(camera, STILL, self._tilt(random), np.zeros(2), None, self._turn(random, ground)))
        photographs.append(ground)
        is_degraded = random.random() < self.clips.degraded
        lead = int(random.integers(LEAD)) if is_degraded else 0
        window = self._window(planes, photographs, lead, random)
        hr = (window["hr"] * 255).round()
        lr = degrade(hr / 255, random) if is_degraded else downscale(hr / 255)
        return window | {"hr": hr[lead:].to(torch.uint8), "lr": (lr[lead:] * 255).round().to(torch.uint8)}

    def _tilt(self, random: Random) -> Array:
        return random.laplace(0, TILT * self.clips.speed, 2)

    def _front(self, random: Random, camera: Motion, photograph: int) -> Plane:
        radius, place = self.side * random.uniform(0.1, 0.35), self.side * random.uniform(-0.4, 0.4, 2)
        own, tilt = Motion.draw(random, self.clips.speed), self._tilt(random)
        return Plane(camera, own, tilt, place, draw_shape(random, radius), self._turn(random, photograph))

    def _turn(self, random: Random, photograph: int) -> Array:
        """(2, 2): a random reduction that the photograph is large enough for, and a random number of quarter turns."""
        shorter = min(self._photograph(photograph).shape[:2])
        limit = max(min(REDUCTION[1], shorter / (MARGIN * self.side)), 1.0)
        reduction = np.exp(random.uniform(np.log(min(REDUCTION[0], limit)), np.log(limit)))
        return reduction * np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), int(random.integers(4)))

    def _window(self, planes: list[Plane], photographs: list[int], lead: int, random: Random) -> Window:
        """`hr` in [0, 1], from `lead` frames before time 0 on, and the flow from time 0 on."""
        points = pixel_centres(self.side, self.side, SUPERSAMPLING)
        times = range(-lead, self.clips.num_frames)
        colors = [
            self._colors(photograph, [plane.on_plane(points, time) for time in times], plane.turn, random)
            for plane, photograph in zip(planes, photographs, strict=True)
        ]
        frames = []
        for position, time in enumerate(times):
            owner = _owner(planes, points, time)
            frame = colors[-1][position]
            for number in range(len(planes) - 1):
                frame = torch.where(torch.from_numpy(owner == number), colors[number][position], frame)
            frames.append(F.avg_pool2d(frame, SUPERSAMPLING))
        window = {"hr": torch.stack(frames)}
        if self.clips.with_flow:
            pairs = [_flow(planes, self.side, time + 1, time) for time in times[lead:-1]]
            window["flow"] = torch.stack([torch.from_numpy(flow).float().permute(2, 0, 1) for flow, _ in pairs])
            window["valid"] = ~torch.stack([torch.from_numpy(hidden) for _, hidden in pairs])
        return window

    def _colors(self, number: int, points: list[Array], turn: Array, random: Random) -> list[Tensor]:
        """A photograph sampled at (rows, columns, 2) plane coordinates: (3, rows, columns) in [0, 1] each.

        Of CANDIDATES random places it takes the one with the most detail. All points are inside if the photograph is
        large enough; otherwise its border is replicated.
        """
        reduction = np.sqrt(np.linalg.det(turn))
        halvings = max(int(np.ceil(np.log2(reduction / DENSEST))), 0)
        photograph = self._photograph(number, halvings)
        points = [p @ (turn / 2**halvings).T for p in points]
        size = np.array(photograph.shape[1::-1])
        low = np.min([p.min((0, 1)) for p in points], axis=0)
        high = np.max([p.max((0, 1)) for p in points], axis=0)
        bounds = np.minimum(1 - low, size / 2), np.maximum(size - 2 - high, size / 2)
        centres = random.uniform(*bounds, (CANDIDATES, 2))
        centre = max(
            centres, key=lambda centre: _detail(photograph, points[0][::SUPERSAMPLING, ::SUPERSAMPLING] + centre)
        )
        first = np.clip(np.floor(centre + low).astype(int) - 1, 0, size - 2)
        last = np.clip(np.ceil(centre + high).astype(int) + 2, first + 2, size)
        part = photograph[first[1] : last[1], first[0] : last[0]].permute(2, 0, 1)[None].float() / 255
        scale = 2 / (last - first)
        return [_sample(part, (p + centre - first + 0.5) * scale - 1) for p in points]

    def _photograph(self, number: int, halvings: int = 0) -> Tensor:
        """(h, w, 3) uint8, halved in size so many times, from a least-recently-used cache."""
        key = number, halvings
        found = self._cache.get(key)
        if found is None:
            found = _halve(self._photograph(number, halvings - 1)) if halvings else _read(self.files[number], self.side)
            self._cache[key] = found
            while sum(kept.numel() for kept in self._cache.values()) > CACHE:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
        return found


def project(matrix: Array, points: Array) -> Array:
    """Apply a (3, 3) homography to (..., 2) points."""
    return transform(matrix, points) / (points @ matrix[2, :2] + matrix[2, 2])[..., None]


def _owner(planes: list[Plane], points: Array, time: float) -> Array:
    """Index of the plane visible at (rows, columns, 2) clip coordinates; the last plane covers everything."""
    owner = np.full(points.shape[:-1], len(planes) - 1)
    for number in range(len(planes) - 2, -1, -1):
        owner[planes[number].seen(points, time)] = number
    return owner


def _flow(planes: list[Plane], side: int, target: float, source: float) -> tuple[Array, Array]:
    """As `Scene.flow`: (side, side, 2) in pixels, and booleans (side, side), true where occluded in `source`."""
    points = pixel_centres(side, side, 1)
    owner = _owner(planes, points, target)
    warped = np.empty_like(points)
    for number in np.unique(owner):
        step = planes[number].matrix(source) @ np.linalg.inv(planes[number].matrix(target))
        warped[owner == number] = project(step, points[owner == number])
    outside = (np.abs(warped) > (side - 1) / 2).any(-1)
    return warped - points, outside | (_owner(planes, warped, source) != owner)


def _detail(photograph: Tensor, points: Array) -> float:
    """Mean difference of the pixels nearest to neighbouring (rows, columns, 2) points."""
    columns, rows = (points[..., axis].round().astype(int).clip(0, photograph.shape[1 - axis] - 1) for axis in (0, 1))
    pixels = photograph[rows, columns].float()
    return float(pixels.diff(dim=0).abs().mean() + pixels.diff(dim=1).abs().mean())


def _halve(photograph: Tensor) -> Tensor:
    """Mean of 2x2 pixels of (h, w, 3) uint8; an odd last row or column is dropped."""
    return F.avg_pool2d(photograph.permute(2, 0, 1).float(), 2).round().byte().permute(1, 2, 0).contiguous()


def _sample(picture: Tensor, grid: Array) -> Tensor:
    """Bilinear sampling of (1, 3, h, w) at (rows, columns, 2) in [-1, 1]: (3, rows, columns)."""
    where = torch.from_numpy(grid).float()[None]
    return F.grid_sample(picture, where, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _photographs(root: Path, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[Path]:
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist, expected a folder of photographs: check data.root")
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise InputError(f"data folder {root} has {found[path.stem].name} and {path.name}: rename one of them")
            found[path.stem] = path
    missing = sorted(set(include) - set(found))
    if missing:
        raise InputError(f"data folder {root} has no photograph {missing[0]}: check data.include")
    names = include or [name for name in found if name not in exclude]
    if not names:
        raise InputError(
            f"data folder {root} has no selected photograph, expected {', '.join(SUFFIXES)}: "
            "check data.include and data.exclude"
        )
    return [found[name] for name in sorted(names, key=natural_key)]


def _read(path: Path, side: int) -> Tensor:
    """Read a photograph as (h, w, 3) uint8."""
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    except Exception as error:  # decoders raise many error types on damaged files
        raise InputError(f"photograph {path} cannot be read ({error})") from error
    height, width = pixels.shape[:2]
    if min(height, width) < MARGIN * side:
        raise InputError(f"{path} is {width}x{height}, expected sides of at least {MARGIN * side:.0f}: use larger ones")
    return pixels
