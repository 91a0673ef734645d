"""Scene cut detection on the LR frames."""

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from stablevsr.sampling.config import SamplingConfig

THUMBNAIL = 16  # side, in pixels
MIN_CHANGE = 0.06  # mean difference of two thumbnails, in [0, 1], below which nothing counts as a cut
RATIO = 3.0  # of a cut to the median of the changes around it, at least
AROUND = 3  # how many changes before and after it are considered


def changes(frames: Iterable[Tensor]) -> list[float]:
    """How much each frame but the first differs from the previous one: mean over small thumbnails, in [0, 1].

    Args:
        frames: (3, h, w) in [-1, 1] each; held one at a time.
    """
    found, previous = [], None
    for frame in frames:
        thumbnail = _thumbnail(frame)
        if previous is not None:
            found.append(_change(thumbnail, previous))
        previous = thumbnail
    return found


def _thumbnail(frame: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(frame[None] / 2 + 0.5, THUMBNAIL)


def _change(thumbnail: Tensor, previous: Tensor) -> float:
    return (thumbnail - previous).abs().mean().item()


def scene_cuts(config: SamplingConfig, frames: Iterable[Tensor]) -> list[int]:
    """The frames that start a new scene, given by the config or found in the LR frames, (3, h, w) in [-1, 1] each."""
    if isinstance(config.scene_cuts, tuple):
        return list(config.scene_cuts)
    return find_cuts(changes(frames)) if config.scene_cuts == "auto" else []


def find_cuts(changes: list[float]) -> list[int]:
    """The frames that start a new scene, from the `changes` of a clip.

    A cut is a large change that stands out from those around it. A fast pan changes as much, but for many frames.
    """
    cuts = []
    for i, change in enumerate(changes):
        around = changes[max(0, i - AROUND) : i] + changes[i + 1 : i + 1 + AROUND]
        if _stands_out(change, around):
            cuts.append(i + 1)
    return cuts


def _stands_out(change: float, around: Iterable[float]) -> bool:
    around = list(around)
    usual = float(np.median(around)) if around else 0.0
    return change > MIN_CHANGE and change > RATIO * usual


class StreamCuts:
    """Scene cut detection in a stream: the rule of `find_cuts`, with past changes only.

    A sudden fast pan counts as a cut here: one frame is not guided, and the changes after it no longer stand out.
    """

    def __init__(self) -> None:
        self._changes: deque[float] = deque(maxlen=AROUND)

    def __call__(self, frame: int, low_res: Tensor, previous_low_res: Tensor) -> bool:
        """Whether `frame` starts a new scene; call once for every frame but the first, in order.

        Args:
            low_res, previous_low_res: this frame and the previous one, (3, h, w) in [-1, 1].
        """
        change = _change(_thumbnail(low_res), _thumbnail(previous_low_res))
        is_cut = _stands_out(change, self._changes)
        self._changes.append(change)
        return is_cut
