"""Upscaling a clip in memory: `sample_video`."""

import torch
from torch import Tensor

from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.progress import OnProgress, Progress, in_pass, report
from stablevsr.engine.run import Run
from stablevsr.engine.store import MemoryStore
from stablevsr.engine.stream import Stream
from stablevsr.sampling.config import SIZES, SamplingConfig, resolve
from stablevsr.sampling.cuts import scene_cuts
from stablevsr.sampling.denoiser import prompt_context
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource
from stablevsr.sampling.pictures import Clip, ClipKind, in_model_range
from stablevsr.sampling.resizing import MAX_PASSES, output_size, passes_for, resized


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

    For a size above four times, the model upscales its own result once more.

    Args:
        model: from `build_model`.
        frames: (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1]; numpy or torch; any n and any size.
        config: how to sample; None takes what the weights were made for.
        noise: a noise source to use instead of the config's seed: any object like `sampling.noise.NoiseSource`; for at
            most four times the size.
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
    size = output_size(config, *kind.size, passes=1 if noise else MAX_PASSES)
    config.check(model.config, len(frames))
    if passes_for(size, kind.size) > 1:
        return _in_two_passes(model, frames, config, size, progress)
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


def _in_two_passes(
    model: Networks, frames: Clip, config: SamplingConfig, size: tuple[int, int], progress: OnProgress | None
) -> Clip:
    """Both passes have the scenes of the input."""
    kind = ClipKind.of(frames)
    cuts = scene_cuts(config, [in_model_range(frame) for frame in kind.to_arrays(frames)])
    config = config.with_fields(dict.fromkeys(SIZES) | {"scene_cuts": tuple(cuts) or "off"})
    larger = sample_video(model, frames, config, progress=in_pass(progress, 1, 2))
    return sample_video(model, larger, config, size=size[::-1], progress=in_pass(progress, 2, 2))


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
