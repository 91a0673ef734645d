"""The streaming loop (Stream-DiffVSR, 2025): frame by frame, from past frames only."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from stablevsr.config import DDIMScheduleConfig, ScheduleConfig
from stablevsr.errors import InputError, OptionsError
from stablevsr.nn.unet import Features
from stablevsr.runtime import SideStream, to_device
from stablevsr.sampling.ddpm import add_noise
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

    def begin(self, x: Tensor, low_res: Tensor, step: Step) -> Features:
        """The part of `predict` that needs no embedding; passed to it as `features`."""
        ...

    def predict(
        self, x: Tensor, low_res: Tensor, step: Step, embedding: Tensor | None, features: Features | None = None
    ) -> Tensor:
        """The network's output for x_t, (c, h, w); `embedding` is None for the first frame of a scene."""
        ...

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(c, h, w) to its picture (3, 4h, 4w), about [-1, 1], not clamped."""
        ...


@runtime_checkable
class Peekable(Protocol):
    """Frames of which the next one may be there already."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def peek(self) -> Tensor | None:
        """The next frame, which stays the next; None, without waiting, if it is not there yet."""
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
            If they are `Peekable`, what of the next frame does not depend on this one's result is computed meanwhile,
            provided that the next one is there already; with the same bits.
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
    loop = _FrameByFrame(steps, schedule, noise, networks, sampler, on_step, is_cut)
    preparation = _Preparation(loop, frames)
    state = start
    for frame, low_res in enumerate(frames, start=0 if state is None else state.frame + 1):
        if state is not None:
            _check_size(frame, low_res, state.low_res)
        finished = loop.finish(preparation.of(frame, low_res, state), state)
        preparation.look_ahead(finished)  # before the check, which waits for the device
        _check_finite(finished)
        state = finished.state
        yield finished
        del finished, low_res  # nothing but the state is held while a stream pauses


class _Prepared(NamedTuple):
    """What of a frame does not depend on the previous picture."""

    frame: int
    low_res: Tensor
    x: Tensor  # (c, h, w), at the first step
    flow: Tensor | None  # to the previous frame; None where a scene starts
    features: Features | None  # of the first step, if it was prepared ahead


@dataclass(frozen=True)
class _FrameByFrame:
    """What all frames of a stream share; see `streaming_sampling`."""

    steps: list[Step]
    schedule: ScheduleConfig
    noise: NoiseSource
    networks: StreamNetworks
    sampler: Sampler
    on_step: OnStep | None
    is_cut: IsCut

    @torch.no_grad()  # not on the generator: its wrapper would hold the last frame
    def prepare(self, frame: int, low_res: Tensor, previous_low_res: Tensor | None, ahead: bool = False) -> _Prepared:
        """The work that needs no picture of the previous frame; `ahead`: with a part of the first step."""
        networks, flow = self.networks, None
        if previous_low_res is not None and not self.is_cut(frame, low_res, previous_low_res):
            flow = networks.flow(low_res, previous_low_res)
        draw = self.noise.initial(frame)
        draw = as_draw(draw, (len(draw), *low_res.shape[1:]), f"frame {frame}")
        x = to_device(draw, low_res.device).to(low_res.dtype)
        clean = networks.encode(low_res)
        if clean is not None:
            x = add_noise(clean, x, self.steps[0].alpha_bar)
        features = networks.begin(x, low_res, self.steps[0]) if ahead else None
        return _Prepared(frame, low_res, x, flow, features)

    @torch.no_grad()
    def finish(self, prepared: _Prepared, state: StreamState | None) -> StreamFrame:
        """Upscale one frame, guided by `state`, the previous frame, unless it starts a scene."""
        networks, condition = self.networks, None
        if prepared.flow is not None:
            assert state is not None  # the flow leads to it
            condition = networks.guide(state.picture, prepared.flow)
        latent = self._denoise(prepared, condition)
        picture = networks.decode(latent, condition)
        return StreamFrame(StreamState(prepared.frame, prepared.low_res, picture), latent, condition)

    def _denoise(self, prepared: _Prepared, condition: Tensor | None) -> Tensor:
        """All steps of a frame: x after the last step, (c, h, w)."""
        frame, low_res, x, _, features = prepared
        embedding, x0 = None if condition is None else self.networks.embed(condition), None
        for step in self.steps:
            prediction = self.networks.predict(x, low_res, step, embedding, features if step.index == 0 else None)
            noise = x.new_zeros(())
            if self.sampler.adds_noise:
                draw = self.noise.step(step.index, frame)
                noise = as_draw(draw, x.shape, f"step {step.index} of frame {frame}").to(x)
            x0, x = self.sampler.step(x, prediction, noise, step, self.schedule, x0)
            if self.on_step is not None:
                self.on_step(StreamStep(frame, step, prediction, x0, x))
        return x


class _Preparation:
    """Prepares the frames of a stream; the next one ahead, if it is there, while the device is busy with this one.

    Everything that is prepared shares a side stream, for the flow network keeps features from frame to frame.
    """

    def __init__(self, loop: _FrameByFrame, frames: Iterable[Tensor]) -> None:
        self._loop, self._peek = loop, frames.peek if isinstance(frames, Peekable) else None
        self._side: SideStream | None = None
        self._ahead: Callable[[], _Prepared | None] | None = None
        self._was_guided = False  # whether a frame before the current one was

    def of(self, frame: int, low_res: Tensor, state: StreamState | None) -> _Prepared:
        """The frame after `state`, prepared."""
        ahead, self._ahead = self._ahead, None
        prepared = ahead() if ahead else None
        if prepared is not None:
            return prepared
        previous = None if state is None else state.low_res
        if self._peek is None:
            return self._loop.prepare(frame, low_res, previous)
        self._side = self._side or SideStream(low_res.device)
        return self._side.start(lambda: self._loop.prepare(frame, low_res, previous), after_main=True)()

    def look_ahead(self, current: StreamFrame) -> None:
        """Prepare the frame after `current`, which the device is still busy with.

        Not before a guided frame is finished: it has needed as much memory as any, and has filled the caches.
        """
        begins, self._was_guided = not self._was_guided, self._was_guided or current.condition is not None
        if begins or self._side is None or not self._side.has_room():
            return
        state = current.state

        def prepare_next() -> _Prepared | None:
            low_res = self._peek() if self._peek else None
            if low_res is None or low_res.shape != state.low_res.shape:  # the latter is refused when its turn comes
                return None
            return self._loop.prepare(state.frame + 1, low_res, state.low_res, ahead=True)

        self._ahead = self._side.start(prepare_next, after_main=False)


def _check_finite(frame: StreamFrame) -> None:
    # The latent is checked too: the decoder's tanh turns infinity into a valid picture.
    if not (frame.latent.isfinite().all() and frame.state.picture.isfinite().all()):
        raise OptionsError(f"frame {frame.state.frame} overflowed: use bf16 or fp32")


def _check_size(frame: int, low_res: Tensor, previous: Tensor) -> None:
    if low_res.shape != previous.shape:
        (h, w), (previous_h, previous_w) = low_res.shape[-2:], previous.shape[-2:]
        raise InputError(
            f"got size {w}x{h} for frame {frame}, expected {previous_w}x{previous_h} as before: a stream keeps one "
            "size; scale or split it first"
        )
