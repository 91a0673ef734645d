"""The frame-wise bidirectional loop (paper, section 4.3): each noise level over all frames, to and fro in turn."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablevsr.config import ScheduleConfig
from stablevsr.sampling.ddpm import ddpm_step
from stablevsr.sampling.noise import NoiseSource, as_draw
from stablevsr.sampling.schedule import Step

# (frame, x_t, step, guidance or None) -> prediction
Predict = Callable[[int, Tensor, Step, Tensor | None], Tensor]
# (x0 estimate of the source frame, source frame, target frame) -> guidance for the target frame
Guide = Callable[[Tensor, int, int], Tensor]


class FrameStep(NamedTuple):
    """One frame at one noise level, behind its step."""

    step: Step
    frame: int  # in display order
    guidance: Tensor | None  # what the TCM saw; None for the first frame of a pass
    prediction: Tensor  # (c, h, w), the network's output
    x0: Tensor  # (c, h, w), the clean estimate
    latent: Tensor  # (c, h, w), x at the next timestep


def pass_order(index: int, num_frames: int) -> range:
    """The frames in the order in which step `index` visits them: first to last, then last to first, and so on."""
    return range(num_frames) if index % 2 == 0 else range(num_frames - 1, -1, -1)


@torch.no_grad()
def bidirectional_sampling(
    latents: list[Tensor] | Tensor,
    steps: list[Step],
    schedule: ScheduleConfig,
    noise: NoiseSource,
    predict: Predict,
    guide: Guide,
) -> Iterator[FrameStep]:
    """Run the loop in place, one frame-step at a time.

    Args:
        latents: indexed by frame; each (c, h, w), float32. Holds x_t before a step and x at the next timestep behind
            it. Anything with `[frame]` and `[frame] = tensor` will do, for the loop does not know where they live.
        steps: from `run_steps`.
        schedule: what the network predicts, and clipping.
        noise: asked for `step(index, frame)` once a frame-step.
        predict, guide: the networks; a lambda will do.

    Yields:
        A `FrameStep` for every frame of every step, in the order of the passes.
    """
    for step in steps:
        previous: FrameStep | None = None  # of this pass
        for frame in pass_order(step.index, len(latents)):
            guidance = None if previous is None else guide(previous.x0, previous.frame, frame)
            x = latents[frame]
            prediction = predict(frame, x, step, guidance)
            draw = as_draw(noise.step(step.index, frame), x.shape, f"step {step.index} of frame {frame}").to(x)
            x0, x = ddpm_step(x, prediction, draw, step, schedule)
            latents[frame] = x
            previous = FrameStep(step, frame, guidance, prediction, x0, x)
            yield previous
