"""Upscaling a clip in memory: `sample_video`."""

import torch
from torch import Tensor

from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.run import Run
from stablevsr.engine.store import MemoryStore
from stablevsr.engine.stream import Stream
from stablevsr.sampling.config import SamplingConfig, resolve
from stablevsr.sampling.cuts import scene_cuts
from stablevsr.sampling.denoiser import prompt_context
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource
from stablevsr.sampling.pictures import Clip, ClipKind
from stablevsr.sampling.resizing import output_size, resized


def sample_video(
    model: Networks,
    frames: Clip,
    config: SamplingConfig | None = None,
    *,
    noise: NoiseSource | None = None,
    progress: OnProgress | None = None,
    **fields: object,
) -> Clip:
    """Upscale a clip four times, by StableVSR (paper, section 4) or in streaming mode, as the config says.

    Args:
        model: from `build_model`.
        frames: (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1]; numpy or torch; any n and any size.
        config: how to sample; None takes what the weights were made for.
        noise: a noise source to use instead of the config's seed: any object like `sampling.noise.NoiseSource`.
        progress: called with a `Progress` after each unit of work; return False to stop.
        fields: fields of `SamplingConfig` by name, which override `config`'s.

    Returns:
        The clip at (4h, 4w), or at the size that the config asks for, of the same kind as `frames`.

    Raises:
        UserError: for invalid frames, and options that are invalid or not supported by these weights, before any work;
            for overflow.
        Stopped: when `progress` returned False.
    """
    config = resolve(config, model.sampling, fields)
    kind = ClipKind.of(frames)
    size = output_size(config, *kind.size)
    config.check(model.config, len(frames))
    context = prompt_context(model, config)
    store = MemoryStore()
    low_res = LowResFrames(store.hold("frames", kind.to_arrays(frames)), len(frames), kind.size)
    if config.mode == "streaming":
        return kind.finish(_streamed(model, low_res, config, kind, noise, context, progress))
    run = Run(
        model,
        store,
        config,
        low_res,
        noise=noise,
        cuts=scene_cuts(config, low_res),
        context=context,
        format=kind.format,
    )
    for event in run.events():
        report(progress, event)
    return kind.finish(torch.stack([resized(picture, size) for picture in run.pictures()]))


def _streamed(
    model: Networks,
    low_res: LowResFrames,
    config: SamplingConfig,
    kind: ClipKind,
    noise: NoiseSource | None,
    context: Tensor,
    progress: OnProgress | None,
) -> Tensor:
    stream, pictures = Stream(model, config, low_res.size, noise=noise, context=context), []
    for frame in stream.frames(low_res):
        pictures.append(resized(stream.picture(frame, kind.format), output_size(config, *kind.size)))
        report(progress, Progress("stream", len(pictures), len(low_res)))
    return torch.stack(pictures)
