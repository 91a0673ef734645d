"""A clip through the whole model: flows, the bidirectional loop, and the final decode."""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stablevsr.errors import UserError
from stablevsr.runtime import numerics, send, under_numerics
from stablevsr.sampling.bidirectional import (
    START,
    FrameStep,
    Latents,
    OverflowWatch,
    SamplingState,
    bidirectional_sampling,
)
from stablevsr.sampling.colour_fix import check_colour_fix, fix_colours
from stablevsr.sampling.ddpm import add_noise
from stablevsr.sampling.denoiser import Denoiser
from stablevsr.sampling.flow import Flows, FlowSource, empty_flows, estimate_flow
from stablevsr.sampling.guidance import PUBLISHED, Guidance
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource, SeededNoise, as_draw
from stablevsr.sampling.pictures import Clip, ClipKind, Frames
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.schedule import alphas_cumprod, run_steps, timesteps
from stablevsr.sampling.tiles import PictureDecoder

USUAL_NOISE_LEVEL = 20


class Progress(NamedTuple):
    """How far a run is, within one phase."""

    phase: str  # "flow", "denoise" or "decode"
    done: int  # pairs of frames, frame-steps, or frames
    total: int


class Stopped(Exception):
    """The progress callback returned False."""


# Called after each unit of work; returning False (not None) stops the run with `Stopped`.
OnProgress = Callable[[Progress], bool | None]


def report(progress: OnProgress | None, phase: str, done: int, total: int) -> None:
    """Call `progress`, if there is one; raises `Stopped` when it returns False."""
    if progress is not None and progress(Progress(phase, done, total)) is False:
        raise Stopped(f"stopped in phase {phase}, {done} of {total} done")


@numerics()
@torch.no_grad()
def flow_between(model: Networks, low_res: Frames, target: int, source: int, half: bool = False) -> Tensor:
    """The flow that fetches frame `source` onto the grid of frame `target`: (1, 2, 4h, 4w) in pixels."""
    frames = (send(low_res[frame][None], model.device) for frame in (target, source))
    return estimate_flow(model.flow, *frames, half)


def fill_flows(
    model: Networks, low_res: Frames, flows: Flows, progress: OnProgress | None = None, half: bool = False
) -> None:
    """Estimate both flows of every neighbouring pair of a clip into `flows`."""
    total = len(low_res) - 1
    for i in range(total):
        flows.forward[i] = flow_between(model, low_res, i + 1, i, half)[0]
        flows.backward[i] = flow_between(model, low_res, i, i + 1, half)[0]
        report(progress, "flow", i + 1, total)


@dataclass(frozen=True)
class NoisyFrames:
    """LR frames with noise added, each made anew when it is asked for."""

    frames: Frames
    noise: NoiseSource
    alpha_bar: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        frame = self.frames[index]
        draw = as_draw(self.noise.low_res(index), frame.shape, f"LR frame {index}")
        return add_noise(frame, draw.to(frame), self.alpha_bar.to(frame))


def used_noise_level(model: Networks, noise_level: int | None) -> int | None:
    """The noise level of the LR frames: the usual one for None, None for models that have none."""
    if model.config.unet.encoder.num_noise_levels is None:
        if noise_level is not None:
            raise UserError("a noise level has no effect with these weights, which know none: leave it out")
        return None
    noise_level = USUAL_NOISE_LEVEL if noise_level is None else noise_level
    limit = model.config.max_noise_level
    if not isinstance(noise_level, int) or not 0 <= noise_level <= limit:
        raise UserError(f"got noise level {noise_level}, expected 0 to {limit} for these weights")
    return noise_level


def noisy_low_res(model: Networks, low_res: Frames, noise_level: int, noise: NoiseSource) -> NoisyFrames:
    """The LR clip noised to `noise_level`, from `used_noise_level`, as stock SD x4 models were trained."""
    if not hasattr(noise, "low_res"):
        raise UserError("these weights noise the LR frames: the noise source needs a method low_res(frame)")
    return NoisyFrames(low_res, noise, alphas_cumprod(model.config.low_res_schedule)[noise_level])


def check_options(
    model: Networks,
    num_frames: int | None,
    *,
    seed: int = 0,
    steps: int = 50,
    sampler: str = "ddpm",
    eta: float = 0.0,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    conditioning_scale: float = 1.0,
    noise_level: int | None = None,
    guidance: Guidance = PUBLISHED,
    tile: int | str = "auto",
    color_fix: str | None = None,
) -> None:
    """Refuse, before any work, options that make no sense or that these weights cannot serve.

    Args:
        num_frames: of the clip, None where that is not known yet.
        seed, ...: as in `sample_video`.

    Raises:
        UserError: for the first of them.
    """
    if num_frames is not None and num_frames > 1 and model.flow is None:
        raise UserError("these weights hold no flow network, which a clip of several frames needs: convert with --flow")
    if guidance.tiny and model.tiny is None:
        raise UserError(
            "these weights hold no tiny decoder for guidance: convert with --tiny, or go without: --no-guide-tiny"
        )
    for name, scale in (("guidance", guidance_scale), ("conditioning", conditioning_scale)):
        if not math.isfinite(scale):
            raise UserError(f"got {name} scale {scale}, expected a finite number")
    if guidance_scale <= 1.0 and negative_prompt is not None:
        raise UserError(f"a negative prompt has no effect with guidance scale {guidance_scale:g}: set it above 1")
    timesteps(model.config.schedule, steps)
    sampler_by_name(sampler, eta)
    used_noise_level(model, noise_level)
    check_colour_fix(color_fix)
    PictureDecoder(model, tile)
    seeded_noise(model, seed, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a prompt that is too long: given when it is used
        prompt_context(model, prompt, negative_prompt, guidance_scale)


def prompt_context(
    model: Networks, prompt: str | None, negative_prompt: str | None = None, guidance_scale: float = 1.0
) -> Tensor:
    """What the UNet reads: (1, tokens, width), or (2, tokens, width) with classifier-free guidance, negative first."""
    context = model.encode_prompt(prompt)
    if guidance_scale <= 1.0:  # 1 and below mean none, as in the reference
        return context
    return torch.cat([model.encode_prompt(negative_prompt), context])


@torch.no_grad()
def sampling_steps(
    model: Networks,
    low_res: Frames,
    flows: FlowSource,
    noise: NoiseSource,
    latents: Latents | None = None,
    start: SamplingState = START,
    decode: PictureDecoder | None = None,
    estimates: Latents | None = None,
    *,
    steps: int = 50,
    sampler: str = "ddpm",
    eta: float = 0.0,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    conditioning_scale: float = 1.0,
    noise_level: int | None = None,
    cuts: Collection[int] = (),
    guidance: Guidance = PUBLISHED,
) -> Iterator[FrameStep]:
    """Sample the latents of a clip, yielding every frame-step; `sample_video` explains the arguments.

    All arguments are checked by the call itself; the work begins with the first frame-step asked for.

    Args:
        low_res: the frames.
        flows: need not be filled before the first frame-step is asked for.
        noise: where the randomness comes from.
        latents: where x_t is kept; None keeps it on the device, filled with the initial noise.
        start: where a run goes on that kept its `latents`.
        decode: decodes for guidance; None does the whole frame at once.
        estimates: where the last x0 of every frame is kept, for samplers that want it; None keeps it on the device.
    """
    n, (_, h, w) = len(low_res), low_res[0].shape
    check_options(
        model,
        n,
        steps=steps,
        sampler=sampler,
        eta=eta,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        conditioning_scale=conditioning_scale,
        noise_level=noise_level,
        guidance=guidance,
    )
    if guidance_scale < 1.0:
        warnings.warn(f"guidance scale {guidance_scale:g} means no guidance, which begins above 1", stacklevel=2)
    if n == 1 and conditioning_scale != 1.0:
        warnings.warn("the conditioning scale has no effect on a single frame", stacklevel=2)
    context = prompt_context(model, prompt, negative_prompt, guidance_scale)
    noise_level = used_noise_level(model, noise_level)
    if noise_level is not None:
        low_res = noisy_low_res(model, low_res, noise_level, noise)
    denoiser = Denoiser(
        model,
        low_res,
        flows,
        context,
        conditioning_scale=conditioning_scale,
        guidance_scale=guidance_scale,
        noise_level=noise_level,
        decode=decode,
        cuts=cuts,
        guidance=guidance,
    )
    if latents is None:
        latents = initial_latents(model, noise, n, h, w)
    schedule = model.config.schedule
    loop = bidirectional_sampling(
        latents,
        run_steps(schedule, steps),
        schedule,
        noise,
        denoiser.predict,
        denoiser.guide,
        start,
        sampler_by_name(sampler, eta),
        estimates,
    )
    return under_numerics(loop)


# What the sampling options are where they are left out.
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(sampling_steps).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "cuts"
}


def initial_latents(model: Networks, noise: NoiseSource, num_frames: int, height: int, width: int) -> Tensor:
    """What a run starts from: unit noise (n, c, h, w) for frames of LR size (height, width), on the device."""
    latents = torch.empty(num_frames, model.config.vae.latent_channels, height, width, device=model.device)
    for frame in range(num_frames):
        latents[frame] = as_draw(noise.initial(frame), latents.shape[1:], f"frame {frame}")
    return latents


@numerics()
def decode_frame(decode: PictureDecoder, latent: Tensor) -> Tensor:
    """A final latent (c, h, w) to its picture (3, 4h, 4w), float32 in [0, 1] on the CPU."""
    picture = decode(latent[None])[0]
    if not picture.isfinite().all():
        raise UserError("a decoded frame is not finite: the numbers overflowed, use bf16 or fp32")
    return (picture.float() / 2 + 0.5).clamp(0, 1).cpu()


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
    sampler: str = "ddpm",
    eta: float = 0.0,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    conditioning_scale: float = 1.0,
    noise_level: int | None = None,
    cuts: Collection[int] = (),
    guidance: Guidance = PUBLISHED,
    tile: int | str = "auto",
    color_fix: str | None = None,
    noise: NoiseSource | None = None,
    progress: OnProgress | None = None,
) -> Clip:
    """Upscale a clip four times (paper, section 4).

    Args:
        model: from `build_model`.
        frames: (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1]; numpy or torch; any n and any size.
        steps: denoising steps, 1 to 999 for the released model.
        seed: of the noise; the same seed gives the same draws on every device.
        prompt: what the picture shows; None is the empty prompt. Anything else needs weights with a text encoder.
        sampler: "ddpm", as published; "ddim" or "dpm++" for fewer steps.
        eta: how much of DDPM's noise DDIM adds, 0 to 1.
        negative_prompt: what it shall not show; only with `guidance_scale` above 1.
        guidance_scale: classifier-free guidance; 1 and below mean none, which is how the paper's results were made.
        conditioning_scale: multiplies what the TCM adds to the UNet.
        noise_level: for weights with a noise-level embedding (stock SD x4): how much noise the LR frames get; None
            is 20, and the only one for weights without.
        cuts: frames that begin a new scene, for which nothing is taken from the scene before; see `find_cuts`.
        guidance: how much of Temporal Texture Guidance is done; less is faster.
        tile: decode in overlapping tiles of this many LR pixels, to save memory; "off" never does, "auto" does once
            memory has run out.
        color_fix: "wavelet" or "adain" draw the colours of each frame back to those of its LR frame; see
            `sampling.colour_fix.fix_colours`. None leaves them, as published.
        noise: draws of your own instead of `seed`: any object like `sampling.noise.NoiseSource`.
        progress: called with a `Progress` after each unit of work; return False to stop.

    Returns:
        The clip at (4h, 4w), of the same kind as `frames`.

    Raises:
        UserError: for frames, steps or scales that make no sense, a prompt that these weights cannot read, and
            numbers that overflow.
        Stopped: when `progress` returned False.
    """
    check_colour_fix(color_fix)
    kind = ClipKind.of(frames)
    low_res = kind.to_model(frames)
    n, _, *size = low_res.shape
    noise = seeded_noise(model, seed, *size) if noise is None else noise
    flows = empty_flows(n, *size)
    latents = initial_latents(model, noise, n, *size)
    decode = PictureDecoder(model, tile)
    frame_steps = sampling_steps(
        model,
        low_res,
        flows,
        noise,
        latents,
        decode=decode,
        steps=steps,
        sampler=sampler,
        eta=eta,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        conditioning_scale=conditioning_scale,
        noise_level=noise_level,
        cuts=cuts,
        guidance=guidance,
    )
    fill_flows(model, low_res, flows, progress, guidance.half_flow)
    watch = OverflowWatch(n)
    for done, result in enumerate(frame_steps, start=1):
        watch.check(done, result)
        report(progress, "denoise", done, steps * n)
    pictures = []
    for frame, latent in zip(low_res, latents, strict=True):
        pictures.append(fix_colours(decode_frame(decode, latent)[None], frame[None] / 2 + 0.5, color_fix)[0])
        report(progress, "decode", len(pictures), len(latents))
    return kind.from_model(torch.stack(pictures))
