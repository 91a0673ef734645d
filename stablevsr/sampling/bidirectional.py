"""The frame-wise bidirectional loop (paper, section 4.3): each step visits all frames, in alternating direction."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stablevsr.config import ScheduleConfig
from stablevsr.errors import OptionsError
from stablevsr.runtime import to_device
from stablevsr.sampling.noise import NoiseSource, as_draw
from stablevsr.sampling.samplers import DDPM, Sampler
from stablevsr.sampling.schedule import Step
from stablevsr.sampling.segments import NO_BORDERS, Borders

# (frame, x_t, step, condition or None) -> prediction
Predict = Callable[[int, Tensor, Step, Tensor | None], Tensor]
# (x0 estimate of the source frame, source, target, step) -> the TCM's condition for the target frame, or None
Guide = Callable[[Tensor, int, int, Step], Tensor | None]


class Latents(Protocol):
    """The latents of a clip by frame, in memory or not; each (c, h, w), float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, frame: int) -> Tensor: ...

    def __setitem__(self, frame: int, latent: Tensor) -> None: ...


@dataclass(frozen=True)
class SamplingState:
    """How far the loop is, and the state it needs to continue."""

    done: int  # frame-steps
    x0: Tensor | None  # (c, h, w), the clean estimate of the last frame-step; None before the first


START = SamplingState(0, None)


class FrameStep(NamedTuple):
    """The result of one sampler step for one frame."""

    step: Step
    frame: int  # in display order
    condition: Tensor | None  # input of the TCM; None for the first frame of a pass or scene, and in unguided steps
    prediction: Tensor  # (c, h, w), the network's output
    x0: Tensor  # (c, h, w), the clean estimate
    latent: Tensor  # (c, h, w), x at the next timestep


class OverflowWatch:
    """Stops a run whose values overflow: at once on the CPU, at the end of the pass elsewhere.

    Reading the flags from a GPU waits for it, so they are read once per pass.
    """

    def __init__(self, num_frames: int) -> None:
        self._num_frames = num_frames
        self._finite: list[tuple[int, Tensor]] = []

    def check(self, done: int, result: FrameStep) -> None:
        """Call after each frame-step, before it is recorded; `done` counts it. Raises `OptionsError`."""
        self._finite.append((result.frame, result.x0.isfinite().all()))
        if done % self._num_frames and result.x0.device.type != "cpu":
            return
        overflowed = [frame for frame, finite in self._finite if not finite]
        self._finite.clear()
        if overflowed:
            raise OptionsError(f"frame {overflowed[0]} overflowed in step {result.step.index}: use bf16 or fp32")


def pass_order(index: int, num_frames: int) -> range:
    """The frames in the order in which step `index` visits them: forward if it is even, backward if odd."""
    return range(num_frames) if index % 2 == 0 else range(num_frames - 1, -1, -1)


@torch.no_grad()
def bidirectional_sampling(
    latents: Latents,
    steps: list[Step],
    schedule: ScheduleConfig,
    noise: NoiseSource,
    predict: Predict,
    guide: Guide,
    start: SamplingState = START,
    sampler: Sampler = DDPM,
    estimates: Latents | None = None,
    borders: Borders = NO_BORDERS,
) -> Iterator[FrameStep]:
    """Run the loop in place, one frame-step at a time.

    With segments, which are not in the paper, see `sampling.segments`.

    Args:
        latents: x_t per frame, updated in place to x at the next timestep. Any indexable container works.
        steps: from `run_steps`.
        schedule: what the network predicts, and clipping.
        noise: called as `step(index, frame)` once per frame-step.
        predict, guide: the networks; a lambda will do.
        start: where to continue; `latents` must be as they were then.
        sampler: the step from one noise level to the next.
        estimates: storage for the x0 of every frame, if the sampler needs it; None keeps it in memory.
        borders: of segments, and what crosses them.

    Yields:
        A `FrameStep` for every frame of every step, in the order visited.
    """
    n, x0 = len(latents), start.x0
    if estimates is None:
        estimates = {}
    passes, first = divmod(start.done, n)
    for step in steps[passes:]:
        order = pass_order(step.index, n)
        for position in range(first, n):
            frame = order[position]
            source = frame - order.step  # the one before it in this pass
            starts_segment = position == 0 or max(frame, source) in borders.starts
            if starts_segment:
                x0 = borders.get(step.index - 1, source)
            assert starts_segment or x0 is not None  # a resumed run reads it from its state file
            x = latents[frame]
            condition = None if x0 is None else guide(to_device(x0, x.device), source, frame, step)
            prediction = predict(frame, x, step, condition)
            draw = as_draw(noise.step(step.index, frame), x.shape, f"step {step.index} of frame {frame}")
            x0_prev = estimates[frame] if sampler.keeps_x0 and step.index > 0 else None
            x0, x = sampler.step(x, prediction, to_device(draw, x.device), step, schedule, x0_prev)
            latents[frame] = x
            if sampler.keeps_x0:
                estimates[frame] = x0
            if starts_segment:
                borders.put(step.index, frame, x0)
            yield FrameStep(step, frame, condition, prediction, x0, x)
        first = 0
