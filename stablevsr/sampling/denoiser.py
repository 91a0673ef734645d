"""The model bound to one clip: `predict` and `guide` of the bidirectional loop."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.errors import OptionsError
from stablevsr.nn.warp import warp_published
from stablevsr.runtime import to_device
from stablevsr.sampling.config import SamplingConfig
from stablevsr.sampling.ddpm import add_noise
from stablevsr.sampling.flow import FlowSource
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import LowResNoise, NoiseSource, as_draw
from stablevsr.sampling.pictures import Frames
from stablevsr.sampling.schedule import Step, alphas_cumprod
from stablevsr.sampling.tiles import PictureDecoder


@dataclass(frozen=True)
class Denoiser:
    """UNet, TCM and temporal guidance for the frames of a clip."""

    model: Networks
    low_res: Frames  # noised for models that embed the noise level
    flows: FlowSource | None  # None for a single frame, which has no neighbour
    config: SamplingConfig
    context: Tensor  # (1, tokens, width), or with classifier-free guidance (2, tokens, width): negative prompt, prompt
    cuts: Collection[int] = ()  # frames that start a new scene, which guidance does not cross
    decode: PictureDecoder | None = None  # None decodes the whole frame at once

    def guide(self, x0: Tensor, source: int, target: int, step: Step) -> Tensor | None:
        """Temporal Texture Guidance (paper, section 4.2): frame `source`'s clean estimate, decoded, on `target`'s grid.

        Args:
            x0: (c, h, w), the estimate of frame `source` at this noise level.

        Returns:
            The TCM's condition, (3, 4h, 4w), about [-1, 1], not clamped; None across a cut, and in unguided steps.
        """
        options = self.config.temporal
        if max(source, target) in self.cuts or not options.applies_to(step.index):
            return None
        decode: Callable[[Tensor], Tensor] = self.decode or PictureDecoder(self.model, "off")
        if options.tiny:
            assert self.model.tiny is not None  # `SamplingConfig.check` requires it
            decode, x0 = self.model.tiny, x0.to(self.model.tiny.dtype)
        picture = decode_at_half_size(decode, x0[None]) if options.half_size else decode(x0[None])
        assert self.flows is not None
        flow = to_device(self.flows.between(target, source), x0.device)
        return warp_published(picture, flow)[0]

    def predict(self, frame: int, x: Tensor, step: Step, condition: Tensor | None) -> Tensor:
        """The network's output for x_t of `frame`, (c, h, w) float32; without a condition the TCM does not run."""
        model = self.model
        count = self.context.shape[0]

        def repeat(value: Tensor) -> Tensor:
            return value[None].to(model.dtype).expand(count, -1, -1, -1)

        def labels(value: int) -> Tensor:
            return torch.full((count,), value, device=x.device)

        network_input = repeat(torch.cat([x, to_device(self.low_res[frame], x.device)]))
        level = self.config.noise_level_for(model.config)
        noise_level = None if level is None else labels(level)
        timestep = labels(step.timestep)
        residuals = None
        if condition is not None:
            residuals = model.tcm(
                network_input, timestep, self.context, repeat(condition), self.config.tcm_scale, noise_level
            )
        prediction = model.unet(network_input, timestep, self.context, noise_level, residuals).float()
        if count == 1:
            return prediction[0]
        negative, positive = prediction
        return negative + self.config.cfg_scale * (positive - negative)


def decode_at_half_size(decode: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """The clean estimate (1, c, h, w) as a picture (1, 3, 4h, 4w), decoded at half that size and enlarged."""
    height, width = x0.shape[-2:]
    even = F.pad(x0, (0, width % 2, 0, height % 2), mode="replicate")
    small = decode(F.avg_pool2d(even, 2))
    large = F.interpolate(small.float(), scale_factor=2, mode="bilinear", align_corners=False).to(small.dtype)
    return large[..., : SCALE * height, : SCALE * width]


@torch.no_grad()
def prompt_context(model: Networks, config: SamplingConfig) -> Tensor:
    """The prompt's embedding, (1, tokens, width); with classifier-free guidance (2, tokens, width), negative first.

    Raises:
        UserError: for a prompt that these weights cannot encode.
    """
    context = model.encode_prompt(config.prompt)
    if config.cfg_scale <= 1.0:  # no guidance at 1 and below, as in the reference
        return context
    return torch.cat([model.encode_prompt(config.negative_prompt), context])


@dataclass(frozen=True)
class NoisyFrames:
    """LR frames with noise added, computed on each access."""

    frames: Frames
    noise: LowResNoise
    alpha_bar: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        frame = self.frames[index]
        draw = as_draw(self.noise.low_res(index), frame.shape, f"LR frame {index}")
        return add_noise(frame, draw.to(frame), self.alpha_bar.to(frame))


@dataclass(frozen=True)
class NoisedEnlargements:
    """A noise source whose `initial` is where frames start with a strength below 1: their enlargement with noise.

    `initial` returns (c, h, w) float32 on the model's device, computed on each call.
    """

    frames: Frames
    noise: NoiseSource
    encode: Callable[[Tensor], Tensor]  # an LR frame to the latent of its enlargement
    alpha_bar: Tensor  # of the first step

    def initial(self, frame: int) -> Tensor:
        latent = self.encode(self.frames[frame])
        draw = as_draw(self.noise.initial(frame), latent.shape, f"frame {frame}")
        return add_noise(latent, to_device(draw, latent.device), self.alpha_bar)

    def step(self, index: int, frame: int) -> Tensor:
        return self.noise.step(index, frame)


def noisy_low_res(model: Networks, low_res: Frames, config: SamplingConfig, noise: NoiseSource) -> Frames:
    """The LR frames as the model expects them: noised to the noise level for stock SD x4 models, else unchanged."""
    level = config.noise_level_for(model.config)
    if level is None:
        return low_res
    schedule = model.config.low_res_schedule
    assert schedule is not None  # `ModelConfig` requires it for models with noise levels
    if not isinstance(noise, LowResNoise):
        raise OptionsError("these weights add noise to the LR frames: the noise source needs a method low_res(frame)")
    return NoisyFrames(low_res, noise, alphas_cumprod(schedule)[level])
