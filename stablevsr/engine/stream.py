"""Upscaling frames one at a time, each finished before the next is requested: `stream_video`."""

import logging
from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from stablevsr.errors import InputError
from stablevsr.runtime import to_device, under_numerics
from stablevsr.sampling.color_fix import fix_colors
from stablevsr.sampling.config import SamplingConfig, resolve
from stablevsr.sampling.cuts import AROUND, StreamCuts
from stablevsr.sampling.denoiser import prompt_context
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource, SeededNoise
from stablevsr.sampling.pictures import Clip, ClipKind, PictureFormat, as_tensor, in_model_range
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.streaming import (
    NO_CUTS,
    IsCut,
    StreamDenoiser,
    StreamFrame,
    StreamState,
    cuts_at,
    stream_steps,
    streaming_sampling,
)
from stablevsr.sampling.tiles import PictureDecoder

log = logging.getLogger(__name__)


class Stream:
    """A model and the options of a stream.

    Args:
        model: on one device.
        config: checked against the model.
        size: of the LR frames, (height, width).
        noise: the noise source; None takes the config's seed.
        context: from `prompt_context`; None encodes the config's prompt.
    """

    def __init__(
        self,
        model: Networks,
        config: SamplingConfig,
        size: tuple[int, int],
        *,
        noise: NoiseSource | None = None,
        context: Tensor | None = None,
    ) -> None:
        for notice in config.notices(model.config, model.sampling):
            log.warning("%s", notice)
        self._device, self._config = model.device, config
        self.decoder = PictureDecoder(model, config.tile)
        self._networks = StreamDenoiser(
            model,
            prompt_context(model, config) if context is None else context,
            config.tcm_scale,
            config.cfg_scale,
            config.flow.half_size,
            None if model.config.is_streaming else self.decoder,
            self.decoder.encode_enlarged if config.strength < 1 else None,
        )
        self._noise = noise or SeededNoise(config.seed, (model.config.vae.latent_channels, *size))
        self._schedule = config.schedule_for(model.config)
        self._sampler = sampler_by_name(config.sampler, config.eta)
        self.is_cut = stream_cuts(config)

    def frames(self, low_res: Iterable[Tensor], start: StreamState | None = None) -> Iterator[StreamFrame]:
        """Yields finished frames, each before the next LR frame is requested.

        Args:
            low_res: (3, h, w) float32 in [-1, 1] each.
            start: the last finished frame; `low_res` are those after it.

        Raises:
            UserError: for a frame of another size, and for overflow.
        """
        loop = streaming_sampling(
            (to_device(frame, self._device) for frame in low_res),
            stream_steps(self._schedule, self._config.steps, self._config.strength),
            self._schedule,
            self._noise,
            self._networks,
            self.is_cut,
            start,
            self._sampler,
        )
        return under_numerics(loop)

    def picture(self, frame: StreamFrame, form: PictureFormat) -> Tensor:
        """The output picture of a finished frame, on the CPU, in this format."""
        picture = (frame.state.picture.float() / 2 + 0.5).clamp(0, 1).cpu()[None]
        low_res = frame.state.low_res.cpu()[None] / 2 + 0.5
        return form.encode(fix_colors(picture, low_res, self._config.color_fix))

    def recall(self, first: int, frames: list[Tensor]) -> None:
        """Before continuing a stream: show the cut detector the LR frames before it, from frame `first` on.

        The detector remembers a few (`cuts.AROUND`) changes from frame to frame.
        """
        for i in range(1, len(frames)):
            self.is_cut(first + i, frames[i], frames[i - 1])


REMEMBERED = AROUND + 1  # frames, for `Stream.recall`


def stream_cuts(config: SamplingConfig) -> IsCut:
    """The rule for where new scenes start in a stream."""
    if config.scene_cuts == "auto":
        return StreamCuts()
    return cuts_at(config.scene_cuts) if isinstance(config.scene_cuts, tuple) else NO_CUTS


def stream_video(
    model: Networks,
    frames: Iterable[Clip],
    config: SamplingConfig | None = None,
    *,
    noise: NoiseSource | None = None,
    **fields: object,
) -> Iterator[Clip]:
    """Upscale frames four times as they arrive (Stream-DiffVSR); each is yielded before the next is requested.

    Only past frames are used, and memory does not grow with their number. Weights that were not made for streaming
    work too, with a warning.

    Args:
        model: from `build_model`.
        frames: (h, w, 3) uint8 or (3, h, w) float in [0, 1] each, as numpy or torch, all of one size; a list, a
            generator, a camera.
        config: how to sample; None takes what the weights were made for. The mode is always "streaming".
        noise: a noise source to use instead of the config's seed: any object like `sampling.noise.NoiseSource`.
        fields: fields of `SamplingConfig` by name, which override `config`'s.

    Returns:
        The finished frames at (4h, 4w), of the same kind as those given, one by one.

    Raises:
        UserError: for options that are invalid or not supported by these weights, at once; for overflow, and a frame
            that is invalid or differs from the first in size or kind, when it arrives.
    """
    config = resolve(config, model.sampling, fields | {"mode": "streaming"})
    config.check(model.config)
    context = prompt_context(model, config)
    return _stream(model, frames, config, noise, context)


def _stream(
    model: Networks, frames: Iterable[Clip], config: SamplingConfig, noise: NoiseSource | None, context: Tensor
) -> Iterator[Clip]:
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return
    kind = _kind(first, 0)
    stream = Stream(model, config, kind.size, noise=noise, context=context)

    def low_res() -> Iterator[Tensor]:
        yield in_model_range(as_tensor(first).cpu())
        for index, frame in enumerate(frames, 1):
            if (found := _kind(frame, index)) != kind:
                raise InputError(
                    f"got {found} for frame {index}, expected {kind} as before: a stream keeps size, type and device"
                )
            yield in_model_range(as_tensor(frame).cpu())

    for finished in stream.frames(low_res()):
        yield kind.finish(stream.picture(finished, kind.format))
        del finished  # nothing but the last frame is held while the stream pauses


def _kind(frame: Clip, index: int) -> ClipKind:
    if not isinstance(frame, np.ndarray | Tensor) or frame.ndim != 3:
        got = f"shape {tuple(frame.shape)}" if hasattr(frame, "shape") else type(frame).__name__
        raise InputError(f"got {got} for frame {index}, expected (h, w, 3) uint8 or (3, h, w) float in [0, 1]")
    return ClipKind.of(frame[None])
