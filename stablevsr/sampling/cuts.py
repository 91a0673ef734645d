"""Where a new scene begins, seen from the LR frames."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

THUMBNAIL = 16  # side, in pixels
LEAST_CHANGE = 0.06  # mean difference of two thumbnails, in [0, 1], below which nothing counts as a cut
RATIO = 3.0  # by how much a cut stands out from the changes around it
AROUND = 3  # how many changes before and after it are looked at


def changes(frames: Iterable[np.ndarray]) -> list[float]:
    """How much each frame but the first differs from the one before: mean over small thumbnails, in [0, 1].

    Args:
        frames: (h, w, 3) uint8 or uint16 each; one at a time is held.
    """
    found, before = [], None
    for frame in frames:
        picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
        picture /= np.iinfo(frame.dtype).max
        thumbnail = F.adaptive_avg_pool2d(picture, THUMBNAIL)
        if before is not None:
            found.append((thumbnail - before).abs().mean().item())
        before = thumbnail
    return found


def find_cuts(changes: list[float]) -> list[int]:
    """The frames that begin a new scene, for the `changes` of a clip.

    A cut is a large change that stands out from those around it. A fast pan changes as much, but for many frames.
    """
    cuts = []
    for i, change in enumerate(changes):
        around = changes[max(0, i - AROUND) : i] + changes[i + 1 : i + 1 + AROUND]
        usual = float(np.median(around)) if around else 0.0
        if change > LEAST_CHANGE and change > RATIO * usual:
            cuts.append(i + 1)
    return cuts
