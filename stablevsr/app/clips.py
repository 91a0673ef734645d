"""The clips that are given to the app: what they are, and single frames of them."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stablevsr.config import SCALE
from stablevsr.engine.outputs import in_depth
from stablevsr.errors import InputError, UserError
from stablevsr.media import Reader, open_reader


@dataclass(frozen=True)
class ClipFacts:
    """What is known of a clip before it is upscaled."""

    path: Path
    width: int
    height: int
    frame_count: int
    frame_rate: float  # frames per second
    notices: tuple[str, ...] = ()

    @property
    def is_video(self) -> bool:
        return self.frame_count > 1

    @property
    def sentence(self) -> str:
        """The facts as a line of text."""
        size = f"{self.width}×{self.height} ({SCALE * self.width}×{SCALE * self.height} at {SCALE}×)"
        if not self.is_video:
            return f"{size}, one image"
        seconds = self.frame_count / self.frame_rate
        return f"{size}, {self.frame_count} frames, {seconds:.1f} s at {self.frame_rate:.4g} frames per second"


def look_at(path: Path) -> ClipFacts:
    """Open a clip and count its frames.

    Raises:
        InputError: for a file that is no clip; the message names it without its folder, which users do not know.
    """
    try:
        with open_reader(path) as clip:
            count = _count(clip)
            if count == 0:
                raise InputError(f"{path} has no frames, expected at least 1")
            notices = tuple(_without_folder(notice, path) for notice in clip.notices)
            return ClipFacts(path, clip.width, clip.height, count, float(clip.frame_rate), notices)
    except UserError as error:
        raise InputError(_without_folder(str(error), path)) from error


def read_frame(path: Path, index: int) -> np.ndarray:
    """Frame `index` of a clip, (h, w, 3) uint8.

    Raises:
        InputError: when the clip ends before it, or cannot be read.
    """
    with open_reader(path) as clip, closing(clip.frames_from(index)) as frames:
        frame = next(frames, None)
    if frame is None:
        raise InputError(f"{path.name} ends before frame {index}: choose an earlier one")
    return in_depth(frame.image, is_deep=False)


def _count(clip: Reader) -> int:
    times = clip.frame_times()  # exact, while `frame_count` is what the file claims
    if times is not None:
        return sum(1 for _ in times)
    return clip.frame_count if clip.frame_count is not None else sum(1 for _ in clip)


def _without_folder(text: str, path: Path) -> str:
    return text.replace(str(path), path.name)
