"""The streaming loop (Stream-DiffVSR, 2025): frame by frame, from past frames only."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from stablevsr.config import DDIMScheduleConfig, ScheduleConfig
from stablevsr.errors import InputError, OptionsError
from stablevsr.nn.attention import CachedContext, Context
from stablevsr.nn.tiny import TemporalTinyVAE
from stablevsr.nn.vae import VAE
from stablevsr.nn.warp import warp_published
from stablevsr.runtime import compiled_parts
from stablevsr.sampling.ddpm import add_noise
from stablevsr.sampling.flow import StreamFlows
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource, as_draw
from stablevsr.sampling.samplers import DDIM, Sampler
from stablevsr.sampling.schedule import Step, alphas_cumprod, run_steps, timesteps

# (frame, its LR picture, the previous LR picture) -> whether the frame starts a new scene
IsCut = Callable[[int, Tensor, Tensor], bool]


class StreamNetworks(Protocol):
    """What the loop calls; `StreamDenoiser` is one. Tensors are single frames, without a batch dimension."""

    def encode(self, low_res: Tensor) -> Tensor | None:
        """The clean latent that is noised to start from, (c, h, w); None to start from pure noise."""
        ...

    def flow(self, low_res: Tensor, previous_low_res: Tensor) -> Tensor:
        """The flow that warps the previous frame onto the current one, (2, 4h, 4w); LR frames are (3, h, w)."""
        ...

    def guide(self, picture: Tensor, flow: Tensor) -> Tensor:
        """The condition: the previous picture, (3, 4h, 4w), on the grid of the current frame."""
        ...

    def embed(self, condition: Tensor) -> Tensor:
        """The embedding of a condition, shared by all steps of a frame; passed to `predict` unchanged."""
        ...

    def predict(self, x: Tensor, low_res: Tensor, step: Step, embedding: Tensor | None) -> Tensor:
        """The network's output for x_t, (c, h, w); `embedding` is None for the first frame of a scene."""
        ...

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(c, h, w) to its picture (3, 4h, 4w), about [-1, 1], not clamped."""
        ...


class StreamState(NamedTuple):
    """The last finished frame: all that the next frame, or a continued run, needs of the past."""

    frame: int
    low_res: Tensor  # (3, h, w) in [-1, 1]
    picture: Tensor  # (3, 4h, 4w), about [-1, 1], not clamped: this is what is warped


class StreamFrame(NamedTuple):
    """A finished frame."""

    state: StreamState
    latent: Tensor  # (c, h, w), input of the decoder
    condition: Tensor | None  # (3, 4h, 4w), input of TCM and decoder; None for the first frame of a scene


class StreamStep(NamedTuple):
    """A frame after one of its steps."""

    frame: int
    step: Step
    prediction: Tensor  # (c, h, w), the network's output
    x0: Tensor  # (c, h, w), the clean estimate; the loop does not use it
    latent: Tensor  # (c, h, w), x at the next timestep


OnStep = Callable[[StreamStep], None]


def ddim_steps(config: ScheduleConfig, num_steps: int, strength: float = 1.0) -> list[Step]:
    """The steps of diffusers' DDIM scheduler, with which streaming weights were distilled; arguments as of `timesteps`.

    A step ends at t - n // num_steps (n trained timesteps). That is the run's next timestep only where num_steps
    divides n, or with "leading" spacing. The last step ends at abar_0 or at 1, as the weights were trained; at 1 for
    weights that were not made for streaming.

    Raises:
        UserError: as `timesteps` does.
    """
    times, products = timesteps(config, num_steps, strength), alphas_cumprod(config)
    stride = config.num_train_timesteps // num_steps
    short = isinstance(config, DDIMScheduleConfig) and not config.set_alpha_to_one
    end = products[0] if short else torch.tensor(1.0)
    return [
        Step(i, time, products[time], products[time - stride] if time >= stride else end)
        for i, time in enumerate(times)
    ]


def stream_steps(config: ScheduleConfig, num_steps: int, strength: float = 1.0) -> list[Step]:
    """The steps of a run: `ddim_steps` for streaming weights; for others each step ends where the next one starts."""
    return (ddim_steps if isinstance(config, DDIMScheduleConfig) else run_steps)(config, num_steps, strength)


def cuts_at(frames: Collection[int]) -> IsCut:
    """A rule by which new scenes start at these frames."""
    return lambda frame, low_res, previous_low_res: frame in frames


NO_CUTS = cuts_at(())


def streaming_sampling(
    frames: Iterable[Tensor],
    steps: list[Step],
    schedule: ScheduleConfig,
    noise: NoiseSource,
    networks: StreamNetworks,
    is_cut: IsCut = NO_CUTS,
    start: StreamState | None = None,
    sampler: Sampler = DDIM,
    on_step: OnStep | None = None,
) -> Iterator[StreamFrame]:
    """Upscale frames as they arrive. Each result is yielded before the next frame is requested.

    While the loop waits for a frame, it holds the last `StreamState` and nothing else (a `StreamDenoiser` keeps the
    flow network's features of that frame).

    Args:
        frames: (3, h, w) each, in [-1, 1], all of one size; the loop computes in their precision and on their device.
        steps: from `stream_steps`.
        schedule: what the network predicts, and clipping.
        noise: called as `initial(frame)` once per frame, and as `step(index, frame)` if the sampler adds noise.
        networks: a `StreamDenoiser`, or anything with its methods.
        is_cut: called for every frame but the first.
        start: the last finished frame, to continue a stream; `frames` are those after it.
        sampler: the step from one noise level to the next; the published one is DDIM.
        on_step: called after each step.

    Yields:
        A `StreamFrame` for every frame.

    Raises:
        UserError: for a frame of another size than the previous one, noise of the wrong shape, and overflow.
    """
    frame_by_frame = _FrameByFrame(steps, schedule, noise, networks, sampler, on_step)
    state = start
    for frame, low_res in enumerate(frames, start=0 if state is None else state.frame + 1):
        if state is not None:
            _check_size(frame, low_res, state.low_res)
        starts_scene = state is None or is_cut(frame, low_res, state.low_res)
        finished = frame_by_frame.finish(frame, low_res, None if starts_scene else state)
        state = finished.state
        yield finished
        del finished, low_res  # nothing but the state is held while a stream pauses


@dataclass(frozen=True)
class _FrameByFrame:
    """What all frames of a stream share; see `streaming_sampling`."""

    steps: list[Step]
    schedule: ScheduleConfig
    noise: NoiseSource
    networks: StreamNetworks
    sampler: Sampler
    on_step: OnStep | None

    @torch.no_grad()  # not on the generator: its wrapper would hold the last frame
    def finish(self, frame: int, low_res: Tensor, state: StreamState | None) -> StreamFrame:
        """Upscale one frame, guided by `state`, the previous frame; without one it starts a scene."""
        networks, condition = self.networks, None
        if state is not None:
            condition = networks.guide(state.picture, networks.flow(low_res, state.low_res))
        draw = self.noise.initial(frame)
        x = as_draw(draw, (len(draw), *low_res.shape[1:]), f"frame {frame}").to(low_res)
        clean = networks.encode(low_res)
        if clean is not None:
            x = add_noise(clean, x, self.steps[0].alpha_bar)
        latent = self._denoise(frame, x, low_res, condition)
        picture = networks.decode(latent, condition)
        # The latent is checked too: the decoder's tanh turns infinity into a valid picture.
        if not (latent.isfinite().all() and picture.isfinite().all()):
            raise OptionsError(f"frame {frame} overflowed: use bf16 or fp32")
        return StreamFrame(StreamState(frame, low_res, picture), latent, condition)

    def _denoise(self, frame: int, x: Tensor, low_res: Tensor, condition: Tensor | None) -> Tensor:
        """All steps of a frame: x_T to x after the last step, (c, h, w) each."""
        embedding, x0 = None if condition is None else self.networks.embed(condition), None
        for step in self.steps:
            prediction = self.networks.predict(x, low_res, step, embedding)
            noise = x.new_zeros(())
            if self.sampler.adds_noise:
                draw = self.noise.step(step.index, frame)
                noise = as_draw(draw, x.shape, f"step {step.index} of frame {frame}").to(x)
            x0, x = self.sampler.step(x, prediction, noise, step, self.schedule, x0)
            if self.on_step is not None:
                self.on_step(StreamStep(frame, step, prediction, x0, x))
        return x


def _check_size(frame: int, low_res: Tensor, previous: Tensor) -> None:
    if low_res.shape != previous.shape:
        (h, w), (previous_h, previous_w) = low_res.shape[-2:], previous.shape[-2:]
        raise InputError(
            f"got size {w}x{h} for frame {frame}, expected {previous_w}x{previous_h} as before: a stream keeps one "
            "size; scale or split it first"
        )


@dataclass(frozen=True)
class StreamDenoiser:
    """The model bound to a run: `StreamNetworks`.

    StableVSR weights work too, though they were not trained for this: their autoencoder decodes each frame on its own.
    `SamplingConfig.check` refuses weights that do not work.
    """

    model: Networks
    context: Tensor  # (1, tokens, width), or (2, tokens, width) for guidance: negative prompt, prompt
    tcm_scale: float = 1.0  # scale of the TCM's residuals
    cfg_scale: float = 1.0  # classifier-free guidance, used when `context` has two entries
    half_flow: bool = False  # estimate flow at half the HR size
    # Scaled latents (1, c, h, w) to pictures, for an autoencoder without temporal modules; None decodes whole frames.
    picture_decoder: Callable[[Tensor], Tensor] | None = None
    encoder: Callable[[Tensor], Tensor] | None = None  # LR frames to latents to start from; None: from pure noise

    @cached_property
    def _flows(self) -> StreamFlows:
        assert self.model.flow is not None  # `SamplingConfig.check` requires it
        return StreamFlows(self.model.flow, self.half_flow)

    @cached_property
    def _text(self) -> Context:
        """Its keys and values are computed once per run; a compiled network computes them in every step."""
        return self.context if compiled_parts(self.model) else CachedContext(self.context)

    def encode(self, low_res: Tensor) -> Tensor | None:
        """The latent of an LR frame, (3, h, w) to (c, h, w), where the run starts from pictures."""
        return None if self.encoder is None else self.encoder(low_res).to(low_res.dtype)

    def flow(self, low_res: Tensor, previous_low_res: Tensor) -> Tensor:
        """The flow from the current frame to the previous one: (2, 4h, 4w) in pixels."""
        return self._flows.to_previous(low_res, previous_low_res)

    def guide(self, picture: Tensor, flow: Tensor) -> Tensor:
        """The previous picture, (3, 4h, 4w), warped along the flow, the same shape."""
        return warp_published(picture[None], flow[None])[0]

    def embed(self, condition: Tensor) -> Tensor:
        """The TCM's embedding of the condition, (1, width, h, w), shared by all steps."""
        return self.model.tcm.embed(condition[None].to(self.model.dtype))

    def predict(self, x: Tensor, low_res: Tensor, step: Step, embedding: Tensor | None) -> Tensor:
        """The network's output for x_t, (c, h, w); without an embedding the TCM does not run."""
        model, count = self.model, len(self.context)
        stacked = torch.cat([x, low_res])[None].to(model.dtype).expand(count, -1, -1, -1)
        timestep = torch.full((count,), step.timestep, device=x.device)
        residuals = None
        if embedding is not None:
            embedding = embedding.expand(count, -1, -1, -1)
            residuals = model.tcm(stacked, timestep, self._text, None, self.tcm_scale, None, embedding)
        prediction = model.unet(stacked, timestep, self._text, None, residuals).to(x.dtype)
        if count == 1:
            return prediction[0]
        negative, positive = prediction
        return negative + self.cfg_scale * (positive - negative)

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(c, h, w) to its picture, (3, 4h, 4w); with a condition, the temporal modules see its features."""
        if self.model.config.is_streaming:
            vae = cast(TemporalTinyVAE, self.model.vae)  # not by isinstance: it may be offloaded
            features = () if condition is None else vae.features(condition[None].to(vae.dtype))
            picture = vae.decode(latent[None].to(vae.dtype), features)
        elif self.picture_decoder is not None:
            picture = self.picture_decoder(latent[None])
        else:
            plain = cast(VAE, self.model.vae)
            picture = plain.decode(latent[None].to(plain.dtype) / plain.scaling_factor)
        return picture[0].to(latent.dtype)
