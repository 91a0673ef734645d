"""One clip from a file or folder to another."""

from pathlib import Path

import numpy as np
import torch

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
    force: bool = False,
    progress: OnProgress | None = None,
    **options: object,
) -> int:
    """Upscale `clip` four times into `output`, which appears under its name only when it is whole.

    Args:
        output: a video, an image (for one frame), or a folder; the name decides.
        seed, progress, options: as in `sampling.video.sample_video`.
        force: replace an output that exists.

    Returns:
        The number of frames written.

    Raises:
        UserError: for input that cannot be read and output that cannot be written.
    """
    frames = list(clip)
    low_res = normalise(torch.from_numpy(np.stack([frame.image for frame in frames])))
    noise = seeded_noise(model, seed, clip.height, clip.width)
    # Opened first: what it refuses, it refuses before hours of work.
    with open_writer(output, clip, height=SCALE * clip.height, width=SCALE * clip.width, force=force) as writer:
        latents = sample_latents(model, low_res, noise, progress=progress, **options)
        for i, (frame, latent) in enumerate(zip(frames, latents, strict=True), start=1):
            writer.write(to_uint8(decode_frame(model, latent)[None])[0].numpy(), frame)
            report(progress, "decode", i, len(frames))
    return len(frames)
