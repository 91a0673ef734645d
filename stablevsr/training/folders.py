"""Clips on disk in the REDS layout: root/{hr,lr}/clip/frame."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.errors import InputError
from stablevsr.media import natural_key
from stablevsr.training.data import Window, Windows, downscale

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class FolderWindows(Windows):
    """Crops of consecutive frames from clips on disk; missing LR frames are made by antialiased bicubic downscaling.

    Args:
        root: holds `hr/CLIP/FRAME` and, to read LR frames from disk, `lr/CLIP/FRAME`.
        include, exclude: clip names; an empty `include` means all clips except `exclude`.
        num_frames: per window.

    Raises:
        UserError: if a folder is missing or empty, or HR and LR clips differ in frame count or names; when a sample is
            read, if a frame cannot be decoded, is smaller than the crop, or HR and LR sizes do not match.
    """

    def __init__(
        self, seed: int, crop: int, root: Path, include: tuple[str, ...], exclude: tuple[str, ...], num_frames: int
    ) -> None:
        super().__init__(seed, crop)
        self.num_frames = num_frames
        self.clips: list[tuple[list[Path], list[Path]]] = []
        hr, lr = root / "hr", root / "lr"
        if not hr.is_dir():
            raise InputError(f"data folder {root} has no folder hr, expected hr/CLIP/FRAME.png: check data.root")
        present = sorted(entry.name for entry in hr.iterdir() if entry.is_dir())
        missing = sorted(set(include) - set(present))
        if missing:
            raise InputError(f"data folder {hr} has no clip {missing[0]}: check data.include")
        for name in include or [name for name in present if name not in exclude]:
            high, low = _frames(hr / name), _frames(lr / name) if lr.is_dir() else []
            if lr.is_dir() and len(low) != len(high):
                raise InputError(
                    f"clip {name} has {len(high)} frames in {hr} and {len(low)} in {lr}, expected equal counts"
                )
            for a, b in zip(high, low, strict=False):
                if a.stem != b.stem:
                    raise InputError(f"clip {name} has HR frame {a.name} but LR frame {b.name}, expected equal names")
            if len(high) >= num_frames:
                self.clips.append((high, low))
        if not self.clips:
            raise InputError(
                f"data folder {hr} has no selected clip of at least {num_frames} frames: "
                "check data.include and data.exclude"
            )

    def clip(self, random: np.random.Generator) -> Window:
        high, low = self.clips[random.integers(len(self.clips))]
        start = random.integers(len(high) - self.num_frames + 1)
        files = slice(start, start + self.num_frames)
        hr = _stack(high[files])
        lr = _stack(low[files]) if low else self._downscaled(hr, high[start])
        expected = (SCALE * lr.shape[-2], SCALE * lr.shape[-1])
        if tuple(hr.shape[-2:]) != expected:
            raise InputError(
                f"{high[start]} is {hr.shape[-1]}x{hr.shape[-2]}, expected {expected[1]}x{expected[0]}, "
                f"four times the size of its LR frame"
            )
        if min(hr.shape[-2:]) < self.crop:
            raise InputError(
                f"{high[start]} is {hr.shape[-1]}x{hr.shape[-2]}, expected sides of at least {self.crop}: "
                "lower data.crop"
            )
        return {"hr": hr, "lr": lr}

    def _downscaled(self, hr: Tensor, path: Path) -> Tensor:
        if hr.shape[-1] % SCALE or hr.shape[-2] % SCALE:
            raise InputError(f"{path} is {hr.shape[-1]}x{hr.shape[-2]}, expected sides divisible by {SCALE}")
        return (downscale(hr) * 255).round() / 255


def _frames(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    frames = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    return sorted(frames, key=lambda path: natural_key(path.name))


def _stack(paths: list[Path]) -> Tensor:
    """Read frames of equal size as (n, 3, h, w) in [0, 1]."""
    pictures = [_read(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = [f"{each.shape[-1]}x{each.shape[-2]}" for each in (picture, pictures[0])]
            raise InputError(f"{path} is {sizes[0]}, expected {sizes[1]} as {paths[0].name}: a clip has one size")
    return torch.stack(pictures)


def _read(path: Path) -> Tensor:
    """Read one frame as (3, h, w) in [0, 1]."""
    try:
        picture = iio.imread(path, plugin="pillow", mode="RGB")
    except Exception as error:  # decoders raise many error types on damaged files
        raise InputError(f"training frame {path} cannot be read ({error})") from error
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
