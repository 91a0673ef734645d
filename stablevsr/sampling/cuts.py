"""Where a new scene begins, seen from the LR frames."""

from collections.abc import Iterable

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from stablevsr.sampling.config import SamplingConfig

THUMBNAIL = 16  # side, in pixels
MIN_CHANGE = 0.06  # mean difference of two thumbnails, in [0, 1], below which nothing counts as a cut
RATIO = 3.0  # by how much a cut stands out from the changes around it
AROUND = 3  # how many changes before and after it are looked at


def changes(frames: Iterable[Tensor]) -> list[float]:
    """How much each frame but the first differs from the previous one: mean over small thumbnails, in [0, 1].

    Args:
        frames: (3, h, w) in [-1, 1] each; one at a time is held.
    """
    found, previous = [], None
    for frame in frames:
        thumbnail = F.adaptive_avg_pool2d(frame[None] / 2 + 0.5, THUMBNAIL)
        if previous is not None:
            found.append((thumbnail - previous).abs().mean().item())
        previous = thumbnail
    return found


def scene_cuts(config: SamplingConfig, frames: Iterable[Tensor]) -> list[int]:
    """The frames that begin a new scene, given by the config or found in the LR frames, (3, h, w) in [-1, 1] each."""
    if isinstance(config.scene_cuts, tuple):
        return list(config.scene_cuts)
    return find_cuts(changes(frames)) if config.scene_cuts == "auto" else []


def find_cuts(changes: list[float]) -> list[int]:
    """The frames that begin a new scene, for the `changes` of a clip.

    A cut is a large change that stands out from those around it. A fast pan changes as much, but for many frames.
    """
    cuts = []
    for i, change in enumerate(changes):
        around = changes[max(0, i - AROUND) : i] + changes[i + 1 : i + 1 + AROUND]
        usual = float(np.median(around)) if around else 0.0
        if change > MIN_CHANGE and change > RATIO * usual:
            cuts.append(i + 1)
    return cuts
