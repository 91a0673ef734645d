"""One clip from a file or folder to another."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.media import Reader, open_writer
from stablevsr.model import StableVSR
from stablevsr.sampling.pictures import normalise, to_uint8
from stablevsr.sampling.video import OnProgress, decode_frame, report, sample_latents, seeded_noise


def upscale(
    model: StableVSR,
    clip: Reader,
    output: Path,
    *,
    seed: int = 0,
    side_by_side: Path | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
    **options: object,
) -> int:
    """Upscale `clip` four times into `output`, which appears under its name only when it is whole.

    Args:
        output: a video, an image (for one frame), or a folder; the name decides.
        seed, progress, options: as in `sampling.video.sample_video`.
        side_by_side: a second output, with bicubic interpolation on the left and the result on the right.
        force: replace an output that exists.

    Returns:
        The number of frames written.

    Raises:
        UserError: for input that cannot be read and output that cannot be written.
    """
    frames = list(clip)
    low_res = normalise(torch.from_numpy(np.stack([frame.image for frame in frames])))
    noise = seeded_noise(model, seed, clip.height, clip.width)
    height, width = SCALE * clip.height, SCALE * clip.width
    with ExitStack() as stack:
        # Opened first: what they refuse, they refuse before hours of work. The last one opened is the first in place.
        pair = side_by_side and stack.enter_context(
            open_writer(side_by_side, clip, height=height, width=2 * width, force=force)
        )
        writer = stack.enter_context(open_writer(output, clip, height=height, width=width, force=force))
        latents = sample_latents(model, low_res, noise, progress=progress, **options)
        for i, (frame, latent) in enumerate(zip(frames, latents, strict=True), start=1):
            picture = decode_frame(model, latent)[None]
            writer.write(to_uint8(picture)[0].numpy(), frame)
            if pair:
                pair.write(to_uint8(torch.cat([bicubic(low_res[i - 1 : i]), picture], dim=-1))[0].numpy(), frame)
            report(progress, "decode", i, len(frames))
    return len(frames)


def bicubic(low_res: Tensor) -> Tensor:
    """What simple interpolation makes of LR frames (n, 3, h, w) in [-1, 1]: (n, 3, 4h, 4w) in [0, 1]."""
    return (F.interpolate(low_res, scale_factor=SCALE, mode="bicubic", align_corners=False) / 2 + 0.5).clamp(0, 1)
