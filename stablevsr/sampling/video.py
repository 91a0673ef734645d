"""A clip through the whole model: flows, the bidirectional loop, and the final decode."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablevsr.errors import UserError
from stablevsr.sampling.bidirectional import FrameStep, bidirectional_sampling
from stablevsr.sampling.ddpm import add_noise
from stablevsr.sampling.denoiser import Denoiser
from stablevsr.sampling.flow import Flows, empty_flows, estimate_flow
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource, SeededNoise, as_draw
from stablevsr.sampling.pictures import Clip, ClipKind
from stablevsr.sampling.schedule import alphas_cumprod, run_steps


class Progress(NamedTuple):
    """How far a run is, within one phase."""

    phase: str  # "flow", "denoise" or "decode"
    done: int  # pairs of frames, frame-steps, or frames
    total: int


class Stopped(Exception):
    """The progress callback returned False."""


# Called behind each unit of work; returning False (not None) stops the run with `Stopped`.
OnProgress = Callable[[Progress], bool | None]


def report(progress: OnProgress | None, phase: str, done: int, total: int) -> None:
    """Tell the callback, if there is one; raises `Stopped` if it says so."""
    if progress is not None and progress(Progress(phase, done, total)) is False:
        raise Stopped(f"stopped in phase {phase}, {done} of {total} done")


@torch.no_grad()
def fill_flows(model: Networks, low_res: Tensor, flows: Flows, progress: OnProgress | None = None) -> None:
    """Estimate both flows of every neighbouring pair of a clip (n, 3, h, w) in [-1, 1] into `flows`."""
    total = low_res.shape[0] - 1
    for i in range(total):
        first, second = (low_res[j : j + 1].to(model.device) for j in (i, i + 1))
        flows.forward[i] = estimate_flow(model.flow, second, first)[0]
        flows.backward[i] = estimate_flow(model.flow, first, second)[0]
        report(progress, "flow", i + 1, total)


def noisy_low_res(model: Networks, low_res: Tensor, noise_level: int, noise: NoiseSource) -> Tensor:
    """The LR clip noised to `noise_level`, as stock SD x4 models were trained."""
    limit = model.config.max_noise_level
    if not isinstance(noise_level, int) or not 0 <= noise_level <= limit:
        raise UserError(f"got noise level {noise_level}, expected 0 to {limit} for these weights")
    if not hasattr(noise, "low_res"):
        raise UserError("these weights noise the LR frames: the noise source needs a method low_res(frame)")
    alpha_bar = alphas_cumprod(model.config.low_res_schedule)[noise_level]
    draws = [as_draw(noise.low_res(i), frame.shape, f"LR frame {i}").cpu() for i, frame in enumerate(low_res)]
    return torch.stack([add_noise(frame, draw, alpha_bar) for frame, draw in zip(low_res, draws, strict=True)])


@torch.no_grad()
def sampling_steps(
    model: Networks,
    low_res: Tensor,
    flows: Flows,
    noise: NoiseSource,
    *,
    steps: int = 50,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    conditioning_scale: float = 1.0,
    noise_level: int = 20,
) -> Iterator[FrameStep]:
    """Sample the latents of a clip, yielding every frame-step; `sample_video` explains the arguments.

    All arguments are checked by the call itself; the work begins with the first frame-step asked for.

    Args:
        low_res: (n, 3, h, w) in [-1, 1].
        flows: need not be filled before the first frame-step is asked for.
        noise: where the randomness comes from.
    """
    if low_res.shape[0] > 1 and model.flow is None:
        raise UserError("these weights hold no flow network, which a clip of several frames needs: convert with --flow")
    for name, scale in (("guidance", guidance_scale), ("conditioning", conditioning_scale)):
        if not math.isfinite(scale):
            raise UserError(f"got {name} scale {scale}, expected a finite number")
    context = model.encode_prompt(prompt)
    if guidance_scale > 1.0:  # 1 and below mean none, as in the reference
        context = torch.cat([model.encode_prompt(negative_prompt), context])
    elif negative_prompt is not None:
        raise UserError(f"a negative prompt has no effect with guidance scale {guidance_scale:g}: set it above 1")
    embeds_noise = model.config.unet.encoder.num_noise_levels is not None
    if embeds_noise:
        low_res = noisy_low_res(model, low_res, noise_level, noise)
    denoiser = Denoiser(
        model, low_res, flows, context, conditioning_scale, guidance_scale, noise_level if embeds_noise else None
    )
    n, _, h, w = low_res.shape
    shape = (model.config.vae.latent_channels, h, w)
    latents = torch.empty(n, *shape, device=model.device)
    for frame in range(n):
        latents[frame] = as_draw(noise.initial(frame), shape, f"frame {frame}")
    schedule = model.config.schedule
    return bidirectional_sampling(
        latents, run_steps(schedule, steps), schedule, noise, denoiser.predict, denoiser.guide
    )


@torch.no_grad()
def decode_frame(model: Networks, latent: Tensor) -> Tensor:
    """A final latent (c, h, w) to its picture (3, 4h, 4w), float32 in [0, 1] on the CPU."""
    vae = model.vae
    picture = vae.decode(latent[None].to(model.device, vae.dtype) / vae.scaling_factor)[0]
    if not picture.isfinite().all():
        raise UserError("a decoded frame is not finite: the numbers overflowed, use bf16 or fp32")
    return (picture.float() / 2 + 0.5).clamp(0, 1).cpu()


def sample_latents(
    model: Networks,
    low_res: Tensor,
    noise: NoiseSource,
    *,
    steps: int = 50,
    progress: OnProgress | None = None,
    **options: object,
) -> list[Tensor]:
    """The final latents of a clip (n, 3, h, w) in [-1, 1], one (c, h, w) a frame; `options` as `sampling_steps`."""
    n = low_res.shape[0]
    flows = empty_flows(n, *low_res.shape[2:])
    results = sampling_steps(model, low_res, flows, noise, steps=steps, **options)
    fill_flows(model, low_res, flows, progress)
    latents: dict[int, Tensor] = {}  # by frame, whatever the direction of the last pass
    for done, result in enumerate(results, start=1):
        latents[result.frame] = result.latent
        report(progress, "denoise", done, steps * n)
    return [latents[frame] for frame in range(n)]


def seeded_noise(model: Networks, seed: int, height: int, width: int) -> SeededNoise:
    """The default noise source for LR frames of this size."""
    return SeededNoise(seed, (model.config.vae.latent_channels, height, width))


def sample_video(
    model: Networks,
    frames: Clip,
    steps: int = 50,
    seed: int = 0,
    prompt: str | None = None,
    *,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    conditioning_scale: float = 1.0,
    noise_level: int = 20,
    noise: NoiseSource | None = None,
    progress: OnProgress | None = None,
) -> Clip:
    """Upscale a clip four times (paper, section 4).

    Args:
        model: from `build_model`.
        frames: (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1]; numpy or torch; any n and any size.
        steps: noise levels to visit, 1 to 999 for the released model.
        seed: of the noise; the same seed gives the same draws on every device.
        prompt: what the picture shows; None is the empty prompt. Anything else needs weights with a text encoder.
        negative_prompt: what it shall not show; only with `guidance_scale` above 1.
        guidance_scale: classifier-free guidance; 1 and below mean none, which is how the paper's results were made.
        conditioning_scale: multiplies what the TCM adds to the UNet.
        noise_level: for weights with a noise-level embedding (stock SD x4): how much noise the LR frames get.
        noise: draws of your own instead of `seed`: any object like `sampling.noise.NoiseSource`.
        progress: called with a `Progress` behind each unit of work; return False to stop.

    Returns:
        The clip at (4h, 4w), of the same kind as `frames`.

    Raises:
        UserError: for frames, steps or scales that make no sense, a prompt that these weights cannot read, and
            numbers that overflow.
        Stopped: when `progress` returned False.
    """
    kind = ClipKind.of(frames)
    low_res = kind.to_model(frames)
    latents = sample_latents(
        model,
        low_res,
        seeded_noise(model, seed, *low_res.shape[2:]) if noise is None else noise,
        steps=steps,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        conditioning_scale=conditioning_scale,
        noise_level=noise_level,
        progress=progress,
    )
    pictures = []
    for latent in latents:
        pictures.append(decode_frame(model, latent))
        report(progress, "decode", len(pictures), len(latents))
    return kind.from_model(torch.stack(pictures))
