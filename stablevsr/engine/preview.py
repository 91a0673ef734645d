"""A look at the result before a long run: one frame, or a part of it, before and after in one picture: `preview`."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean

import numpy as np
import torch

from stablevsr.config import SCALE
from stablevsr.engine.memory import sample_video
from stablevsr.engine.outputs import enlarged
from stablevsr.engine.progress import OnProgress, Progress
from stablevsr.errors import OptionsError
from stablevsr.media import Frame, Reader
from stablevsr.model import Model
from stablevsr.sampling.config import SIZES, SamplingConfig, resolve
from stablevsr.sampling.resizing import MAX_PASSES, output_size, passes_for, resized

GAP = 4  # white pixels between before and after


@dataclass(frozen=True)
class Crop:
    """A part of a frame, in pixels of the input."""

    width: int
    height: int
    left: int
    top: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.left}+{self.top}"

    def of(self, image: np.ndarray) -> np.ndarray:
        """This part of (h, w, c)."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Preview:
    """What a run would give, and how long it would take.

    picture: (h, w, 3) uint8; bicubic interpolation on the left, the result on the right, a row for each frame.
    frames: the frames shown, counted from 0.
    profile: the ICC profile of the picture, if the clip's has one.
    count: the number of frames of the whole clip; None if it does not know its length.
    seconds: an estimate for all of them on this machine.
    """

    picture: np.ndarray
    frames: range
    profile: bytes | None
    count: int | None
    seconds: float | None


def preview(
    model: Model,
    clip: Reader,
    frame: int,
    crop: Crop | None = None,
    config: SamplingConfig | None = None,
    *,
    progress: OnProgress | None = None,
    **fields: object,
) -> Preview:
    """Upscale a frame and its neighbours, which guide it, as a run over the whole clip would.

    The noise is another, so that details differ from that run's. The time is estimated from the guided frame-steps,
    for a part of a frame by the number of pixels.

    Args:
        model: from `build_model`.
        clip: can be read from its start.
        frame: counted from 0; shown with the one before it, or, for a crop, with one on either side.
        crop: the part to upscale; None is the whole frame.
        config: how to sample; None takes what the weights were made for.
        progress: as in `sample_video`.
        fields: fields of `SamplingConfig` by name, which override `config`'s.

    Raises:
        UserError: for a frame or a part that the clip does not have, and as `sample_video` does.
        Stopped: when `progress` returned False.
    """
    config = resolve(config, model.sampling, fields)
    size = output_size(config, clip.height, clip.width, passes=MAX_PASSES)
    passes = passes_for(size, (clip.height, clip.width))
    require_place(clip, frame, crop)
    crop_or_all = crop or Crop(clip.width, clip.height, 0, 0)
    shown, frames = _frames(clip, frame, 1 if crop else 0)
    lr = [np.ascontiguousarray(crop_or_all.of(each.image)) for each in frames]
    watch = _Stopwatch(progress)
    result = sample_video(model, _as_clip(lr), _for_part(config, shown, passes), progress=watch)
    target = tuple(
        max(1, round(side * whole / full))
        for side, whole, full in zip(lr[0].shape[:2], size, (clip.height, clip.width), strict=True)
    )
    rows = [_row(before, after, target) for before, after in zip(lr, _as_images(result), strict=True)]
    pixels = clip.height * clip.width / (crop_or_all.height * crop_or_all.width)
    count = _count(clip)
    seconds = None if count is None else pixels * watch.estimate(len(frames), count, config.steps_taken)
    return Preview(np.concatenate(list(_with_gaps(rows, axis=0))), shown, frames[0].profile, count, seconds)


def require_place(clip: Reader, frame: int, crop: Crop | None) -> None:
    """`OptionsError` unless the clip has this frame, as far as it knows, and this part of it."""
    count = clip.frame_count
    if frame < 0 or (count is not None and frame >= count):
        raise OptionsError(f"got frame {frame} for a preview, expected 0 to {'...' if count is None else count - 1}")
    if crop is not None:
        fits = 0 < crop.width <= clip.width - crop.left and 0 < crop.height <= clip.height - crop.top
        if not fits or min(crop.left, crop.top) < 0:
            raise OptionsError(f"got the part {crop}, expected one inside of {clip.width}x{clip.height}")


def _count(clip: Reader) -> int | None:
    """The number of frames; counted, without decoding, for files that do not state it."""
    if clip.frame_count is not None:
        return clip.frame_count
    times = clip.frame_times()
    return None if times is None else sum(1 for _ in times)


def _frames(clip: Reader, frame: int, after: int) -> tuple[range, list[Frame]]:
    """The frame, one before it and `after` after it, as far as the clip has them, with their numbers."""
    first = max(0, frame - 1)
    last = frame + after if frame else 1  # the first one is shown with the second
    with closing(clip.frames_from(first)) as frames:
        found = list(islice(frames, last - first + 1))
    if len(found) <= frame - first:
        raise OptionsError(f"got frame {frame} for a preview, but {clip.path} ends before it")
    return range(first, first + len(found)), found


def _for_part(config: SamplingConfig, shown: range, passes: int) -> SamplingConfig:
    """The config for these frames alone, at four times the size, or sixteen for two passes."""
    if isinstance(config.scene_cuts, tuple):
        cuts = tuple(cut - shown.start for cut in config.scene_cuts if cut in shown[1:])
        config = replace(config, scene_cuts=cuts or "off")
    return config.with_fields(dict.fromkeys(SIZES) | {"scale": float(SCALE**passes)})


def _as_clip(images: list[np.ndarray]) -> np.ndarray:
    """Frames of 8 or 16 bits as `sample_video` takes them."""
    stack = np.stack(images)
    return np.moveaxis(stack, -1, 1).astype(np.float32) / 65535 if stack.dtype == np.uint16 else stack


def _as_images(clip: object) -> list[np.ndarray]:
    """What `sample_video` gives for that, as (h, w, 3) uint8 each."""
    assert isinstance(clip, np.ndarray)
    if clip.dtype == np.uint8:
        return list(clip)
    return list((np.moveaxis(clip, 1, -1) * 255).round().astype(np.uint8))


def _row(lr: np.ndarray, result: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    height, width = size
    pictures = (enlarged(lr, False, passes_for((height, width), lr.shape[:2])), result)
    both = [resized(torch.from_numpy(picture), (height, width)).numpy() for picture in pictures]
    return np.concatenate(list(_with_gaps(both, axis=1)), axis=1)


def _with_gaps(pictures: list[np.ndarray], axis: int) -> Iterator[np.ndarray]:
    for index, picture in enumerate(pictures):
        if index:
            shape = list(picture.shape)
            shape[axis] = GAP
            yield np.full(shape, 255, np.uint8)
        yield picture


class _Stopwatch:
    """Measures how long each unit of work takes; passes the progress on."""

    def __init__(self, progress: OnProgress | None) -> None:
        self._progress, self._last = progress, time.monotonic()
        self._seconds: dict[tuple[int, str], list[float]] = {}  # by pass of the model, and phase

    def __call__(self, progress: Progress) -> bool | None:
        now = time.monotonic()
        self._seconds.setdefault((progress.model_pass, progress.phase), []).append(now - self._last)
        answer = self._progress(progress) if self._progress else None
        self._last = time.monotonic()
        return answer

    def estimate(self, measured: int, frames: int, steps: int) -> float:
        """Seconds for `frames` frames, from a run over `measured`."""
        return sum(self._of_pass(each, measured, frames, steps) for each in {number for number, _ in self._seconds})

    def _of_pass(self, model_pass: int, measured: int, frames: int, steps: int) -> float:
        flow, denoise, decode, stream = (
            self._seconds.get((model_pass, phase), []) for phase in ("flow", "denoise", "decode", "stream")
        )
        # The first frame of each step is not guided, which is rare in a longer clip; the very first units are slow.
        guided = [seconds for unit, seconds in enumerate(denoise) if unit % measured]
        per_frame = _typical(decode) + _typical(stream)
        return frames * (steps * _typical(guided or denoise) + per_frame) + (frames - 1) * _typical(flow)


def _typical(seconds: list[float]) -> float:
    """The mean without the first, which may include a warm-up; 0 for none."""
    return mean(seconds[1:] or seconds or [0.0])
