"""A bidirectional run, for `sample_video` and `upscale`: flows, the loop, the final decode."""

import logging
import math
from collections.abc import Collection, Generator, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.engine.arrays import KeptFlows, LowResFrames, StepLatents
from stablevsr.engine.borders import Neighbors, StoredBorders
from stablevsr.engine.progress import Progress
from stablevsr.engine.state import RunState
from stablevsr.engine.store import Array, Store
from stablevsr.errors import OptionsError
from stablevsr.runtime import numerics, under_numerics
from stablevsr.sampling.bidirectional import (
    START,
    FrameStep,
    OverflowWatch,
    SamplingState,
    bidirectional_sampling,
    pass_order,
)
from stablevsr.sampling.color_fix import fix_colors
from stablevsr.sampling.config import SamplingConfig
from stablevsr.sampling.denoiser import Denoiser, NoisedEnlargements, noisy_low_res, prompt_context
from stablevsr.sampling.flow import EstimatedFlows, FlowSource
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource, SeededNoise
from stablevsr.sampling.pictures import PictureFormat
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.schedule import run_steps
from stablevsr.sampling.segments import NO_BORDERS, Borders, segment_starts
from stablevsr.sampling.tiles import PictureDecoder

log = logging.getLogger(__name__)
FLOAT = torch.float32


class Run:
    """A run over a store: `events` does the work, then `pictures` yields the result.

    Args:
        model: on one device.
        store: holds the arrays, and the state of an earlier run if there is one.
        config: checked against the model.
        frames: the LR frames.
        noise: the noise source; None takes the config's seed.
        cuts: frames that start a new scene.
        context: from `prompt_context`; None encodes the config's prompt.
        format: of the pictures.
        neighbors: of `frames`, if they are one segment of a longer scene.
        notify: log what the user should know of the config.

    Raises:
        UserError: from `events` and `pictures`, for overflow and for errors of the store.
    """

    def __init__(
        self,
        model: Networks,
        store: Store,
        config: SamplingConfig,
        frames: LowResFrames,
        *,
        noise: NoiseSource | None = None,
        cuts: Collection[int] = (),
        context: Tensor | None = None,
        format: PictureFormat,
        neighbors: Neighbors | None = None,
        notify: bool = True,
    ) -> None:
        self._model, self._store, self._config, self._frames, self._cuts = model, store, config, frames, cuts
        height, width = frames.size
        self._latent_shape = (model.config.vae.latent_channels, height, width)
        self._noise = noise or SeededNoise(config.seed, self._latent_shape)
        self._context = prompt_context(model, config) if context is None else context
        self._format, self._picture_shape = format, format.shape(SCALE * height, SCALE * width)
        self._neighbors = neighbors
        self._first, self._pairs = 0, len(frames) - 1  # of frames between which there is a flow
        if neighbors is not None:
            self._first, self._pairs = -neighbors.before, self._pairs + neighbors.before + neighbors.after
        if notify:
            _log_notices(model, config, self._pairs)
        self._sampler = sampler_by_name(config.sampler, config.eta)
        self._segments = segment_starts(config.segments, sorted(cuts), len(frames))
        self._decoder = PictureDecoder(model, config.tile)
        self._steps = run_steps(config.schedule_for(model.config), config.steps, config.strength)
        self._initial = self._noise
        if config.strength < 1:
            encode, first = self._decoder.encode_enlarged, self._steps[0]
            self._initial = NoisedEnlargements(frames, self._noise, encode, first.alpha_bar)
        self._estimated = None
        if model.flow is not None and self._pairs > 0:
            seen = frames if neighbors is None else neighbors.frames
            self._estimated = EstimatedFlows(model.flow, seen, model.device, config.flow.half_size)
        self.state = store.load()
        if self.state.phase == "decode" and self.state.depth != format.name:
            self.state = replace(self.state, done=0)  # the output has another depth than when the run was stopped

    @property
    def num_frame_steps(self) -> int:
        return len(self._steps) * len(self._frames)

    def sizes(self) -> dict[str, int]:
        """Bytes of the arrays of a run, by name."""
        n = len(self._frames)
        latents = self._store.slots * n * math.prod(self._latent_shape) * FLOAT.itemsize
        sizes = {"latents": latents, "pictures": n * math.prod(self._picture_shape) * self._format.dtype.itemsize}
        if self._sampler.keeps_x0:
            sizes["estimates"] = latents
        borders = len(self._segments) + (self._neighbors is not None)
        if borders:
            sizes["borders"] = 2 * borders * math.prod(self._latent_shape) * FLOAT.itemsize
        if self._estimated is not None:
            sizes["flows"] = self._pairs * 2 * math.prod(self._estimated.shape) * FLOAT.itemsize
        return sizes

    def events(self) -> Iterator[Progress]:
        """Do the remaining work, up to the decoded pictures; yields after each unit."""
        if self.state.phase == "flow":
            yield from self.estimate_flows()
        if self.state.phase == "denoise":
            for done, _ in enumerate(self.frame_steps(), self.state.done + 1):
                yield Progress("denoise", done, self.num_frame_steps)
        if self._store.keeps("pictures"):
            yield from self._decode()

    def estimate_flows(self) -> Iterator[Progress]:
        """Estimate and store the flows of every neighbouring pair, if there is room."""
        array, estimated = self._flow_array(), self._estimated
        if estimated is not None:
            for pair in range(self.state.done, self._pairs if array else 0):
                first, second = pair + self._first, pair + self._first + 1
                self._frames.prefetch(min(second + 1, len(self._frames) - 1))
                if array and second not in self._cuts:
                    ways = ((second, first), (first, second))
                    array.write(pair, torch.stack([estimated.estimate(*way) for way in ways]))
                self._save(RunState("flow", pair + 1))
                yield Progress("flow", pair + 1, self._pairs)
            estimated.forget()
        self._save(RunState("denoise"), now=True)

    def frame_steps(self) -> Generator[FrameStep, None, None]:
        """The bidirectional loop; yields every frame-step once it is recorded."""
        model, config, n = self._model, self._config, len(self._frames)
        schedule = config.schedule_for(model.config)
        start = SamplingState(self.state.done, self.state.x0) if self.state.phase == "denoise" else START
        array, flows = self._flow_array(), self._flows()
        low_res = noisy_low_res(model, self._frames, config, self._noise)
        denoiser = Denoiser(model, low_res, flows, config, self._context, self._cuts, self._decoder)
        latents = self._latents("latents", start.done)
        estimates = self._latents("estimates", start.done) if self._sampler.keeps_x0 else None
        loop = bidirectional_sampling(
            latents,
            self._steps,
            schedule,
            self._noise,
            denoiser.predict,
            denoiser.guide,
            start,
            self._sampler,
            estimates,
            self._borders(),
        )
        watch = OverflowWatch(n)

        def visit(unit: int) -> int:
            return pass_order(unit // n, n)[unit % n]

        def prepare(unit: int) -> None:
            """Before frame-step `unit`: choose how to decode, and prefetch what the next one reads."""
            self._tile_from(unit)
            if unit + 1 < self.num_frame_steps and visit(unit + 1) != visit(unit):
                frame, source = visit(unit + 1), visit(unit)
                for kept in (self._frames, latents, estimates):
                    if kept is not None:
                        kept.prefetch(frame)
                guided = config.temporal.applies_to((unit + 1) // n) and max(frame, source) not in self._cuts
                if array and guided:  # what is prefetched but never read would stay in memory
                    array.prefetch(min(frame, source) - self._first)

        prepare(start.done)
        for done, result in enumerate(under_numerics(loop), start.done + 1):
            watch.check(done, result)
            # Always at the end of a pass: the next one overwrites the input of this one.
            self._save(RunState("denoise", done, result.x0), unit=done - 1, now=done % n == 0)
            yield result
            prepare(done)
        self._save(RunState("decode"), now=True)
        for name in ("flows", "estimates", "borders"):
            self._store.drop(name)

    def pictures(self) -> Iterator[Tensor]:
        """The finished pictures in order, in the run's format; decoded now if there was no room to store them."""
        if self._store.keeps("pictures"):
            array = self._picture_array()
            for frame in range(len(self._frames)):
                array.prefetch(min(frame + 1, len(self._frames) - 1))
                yield array.read(frame)
            return
        latents = self._latents("latents", self.num_frame_steps)
        for frame in range(len(self._frames)):
            yield self._picture(frame, latents)
            self._save(RunState("decode"), unit=self.num_frame_steps + frame)

    def _decode(self) -> Iterator[Progress]:
        """Decode and store the pictures, so that this phase can be continued like the others."""
        total, array = len(self._frames), self._picture_array()
        latents = self._latents("latents", self.num_frame_steps)
        if self.state.done < total:
            latents.prefetch(self.state.done)
        for frame in range(self.state.done, total):
            latents.prefetch(min(frame + 1, total - 1))
            self._frames.prefetch(min(frame + 1, total - 1))
            array.write(frame, self._picture(frame, latents))
            state = RunState("decode", frame + 1, depth=self._format.name)
            self._save(state, unit=self.num_frame_steps + frame, now=frame + 1 == total)
            yield Progress("decode", frame + 1, total)

    def _picture(self, frame: int, latents: StepLatents) -> Tensor:
        self._tile_from(self.num_frame_steps + frame)
        picture = decode_frame(self._decoder, latents[frame])[None]
        low_res = self._frames[frame][None] / 2 + 0.5
        return self._format.encode(fix_colors(picture, low_res, self._config.color_fix))

    def _tile_from(self, unit: int) -> None:
        """Before unit `unit`: decode in tiles if an earlier run did so at this point."""
        if self.state.tiled_since is not None and unit >= self.state.tiled_since:
            self._decoder.fall_back()

    def _save(self, state: RunState, unit: int | None = None, now: bool = False) -> None:
        """Record a state; if memory has just run out, with the unit at which it did, and at once."""
        since = self.state.tiled_since
        if unit is not None and self._decoder.has_fallen_back and (since is None or unit < since):
            since, now = unit, True
        self.state = replace(state, tiled_since=since)
        self._store.save(self.state, now)

    def _latents(self, name: str, done: int) -> StepLatents:
        array = self._store.array(name, self._latent_shape, FLOAT, self._model.device)
        shape, device = self._latent_shape, self._model.device
        return StepLatents(array, len(self._frames), self._initial, shape, device, done, self._store.slots)

    def _flows(self) -> FlowSource | None:
        """The flows, stored or estimated on demand; None for a single frame."""
        array = self._flow_array()
        return KeptFlows(array, self._estimated, self._first) if array and self._estimated else self._estimated

    def _borders(self) -> Borders:
        if self._neighbors is not None:
            return self._neighbors.borders
        if not self._segments:
            return NO_BORDERS
        array = self._store.array("borders", self._latent_shape, FLOAT, self._model.device)
        return StoredBorders(array, self._segments)

    def _flow_array(self) -> Array | None:
        if self._estimated is None or not self._store.keeps("flows"):
            return None
        return self._store.array("flows", (2, *self._estimated.shape), FLOAT, self._model.device)

    def _picture_array(self) -> Array:
        return self._store.array("pictures", self._picture_shape, self._format.dtype, torch.device("cpu"))


def _log_notices(model: Networks, config: SamplingConfig, pairs: int) -> None:
    for notice in config.notices(model.config, model.sampling):
        log.warning("%s", notice)
    if pairs == 0 and config.tcm_scale != 1.0:
        log.warning("tcm_scale has no effect on a single frame")


@numerics()
def decode_frame(decode: PictureDecoder, latent: Tensor) -> Tensor:
    """A final latent (c, h, w) to its picture (3, 4h, 4w), float32 in [0, 1] on the CPU."""
    picture = decode(latent[None])[0]
    if not picture.isfinite().all():
        raise OptionsError("a decoded frame overflowed: use bf16 or fp32")
    return (picture.float() / 2 + 0.5).clamp(0, 1).cpu()
