"""The model bound to one clip: what the bidirectional loop calls `predict` and `guide`."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevsr.nn.warp import warp_published
from stablevsr.runtime import send
from stablevsr.sampling.flow import FlowSource
from stablevsr.sampling.guidance import PUBLISHED, Guidance
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.pictures import Frames
from stablevsr.sampling.schedule import Step
from stablevsr.sampling.tiles import PictureDecoder


@dataclass(frozen=True)
class Denoiser:
    """UNet, TCM and guidance for the frames of a clip."""

    model: Networks
    low_res: Frames  # noised for models that embed the noise level
    flows: FlowSource
    context: Tensor  # (1, tokens, width), or (2, tokens, width) for guidance: negative prompt, prompt
    conditioning_scale: float = 1.0  # multiplies what the TCM adds
    guidance_scale: float = 1.0  # classifier-free guidance, used when `context` has two entries
    noise_level: int | None = None  # of low_res, for models that embed it
    decode: PictureDecoder | None = None  # None decodes the whole at once
    cuts: Collection[int] = ()  # frames that begin a new scene: nothing is fetched across
    guidance: Guidance = PUBLISHED  # how much of it is done

    def guide(self, x0: Tensor, source: int, target: int, step: Step) -> Tensor | None:
        """Temporal Texture Guidance (paper, section 4.2): frame `source`'s clean estimate, decoded, on `target`'s grid.

        Args:
            x0: (c, h, w), the estimate of frame `source` at this noise level.

        Returns:
            (3, 4h, 4w), about [-1, 1], not clamped; None across a cut, and in steps without guidance.
        """
        if max(source, target) in self.cuts or not self.guidance.wanted(step):
            return None
        if self.guidance.tiny:
            decode, x0 = self.model.tiny, x0.to(self.model.tiny.dtype)
        else:
            decode = self.decode or PictureDecoder(self.model, "off")
        picture = self.guidance.picture(decode, x0[None])
        flow = send(self.flows.between(target, source), x0.device)
        return warp_published(picture, flow)[0]

    def predict(self, frame: int, x: Tensor, step: Step, guidance: Tensor | None) -> Tensor:
        """The network's output for x_t of `frame`, (c, h, w) float32; without guidance the UNet is alone."""
        model = self.model
        count = self.context.shape[0]

        def repeat(value: Tensor) -> Tensor:
            return value[None].to(model.dtype).expand(count, -1, -1, -1)

        def labels(value: int) -> Tensor:
            return torch.full((count,), value, device=x.device)

        network_input = repeat(torch.cat([x, send(self.low_res[frame], x.device)]))
        noise_level = None if self.noise_level is None else labels(self.noise_level)
        timestep = labels(step.timestep)
        residuals = None
        if guidance is not None:
            residuals = model.tcm(
                network_input, timestep, self.context, repeat(guidance), self.conditioning_scale, noise_level
            )
        prediction = model.unet(network_input, timestep, self.context, noise_level, residuals).float()
        if count == 1:
            return prediction[0]
        negative, positive = prediction
        return negative + self.guidance_scale * (positive - negative)
