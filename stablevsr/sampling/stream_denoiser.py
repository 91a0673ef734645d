"""The model bound to a stream: the networks of the streaming loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from stablevsr.nn.attention import CachedContext, Context
from stablevsr.nn.tiny import TemporalTinyVAE
from stablevsr.nn.unet import Features
from stablevsr.nn.vae import VAE
from stablevsr.nn.warp import warp_published
from stablevsr.runtime import compiled_parts
from stablevsr.sampling.flow import StreamFlows
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.schedule import Step


@dataclass(frozen=True)
class StreamDenoiser:
    """The model bound to a run: `streaming.StreamNetworks`.

    StableVSR weights work too, though they were not trained for this: their autoencoder decodes each frame on its own.
    `SamplingConfig.check` refuses weights that do not work.
    """

    model: Networks
    context: Tensor  # (1, tokens, width), or (2, tokens, width) for guidance: negative prompt, prompt
    tcm_scale: float = 1.0  # scale of the TCM's residuals
    cfg_scale: float = 1.0  # classifier-free guidance, used when `context` has two entries
    half_flow: bool = False  # estimate flow at half the HR size, as `half` of `estimate_flow`
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

    def begin(self, x: Tensor, low_res: Tensor, step: Step) -> Features:
        """The UNet's encoder and middle for x_t; not of an offloaded model."""
        return self.model.unet.encoder(*self._inputs(x, low_res, step), self._text)

    def predict(
        self, x: Tensor, low_res: Tensor, step: Step, embedding: Tensor | None, features: Features | None = None
    ) -> Tensor:
        """The network's output for x_t, (c, h, w); without an embedding the TCM does not run."""
        model, inputs, residuals = self.model, self._inputs(x, low_res, step), None
        if embedding is not None:
            embedding = embedding.expand(len(self.context), -1, -1, -1)
            residuals = model.tcm(*inputs, self._text, None, self.tcm_scale, None, embedding)
        if features is None:
            prediction = model.unet(*inputs, self._text, None, residuals).to(x.dtype)
        else:
            prediction = model.unet.decoder(features.plus(residuals), self._text).to(x.dtype)
        if len(self.context) == 1:
            return prediction[0]
        negative, positive = prediction
        return negative + self.cfg_scale * (positive - negative)

    def _inputs(self, x: Tensor, low_res: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Network input, (n, c + 3, h, w), and timesteps, (n,), for the n contexts."""
        count = len(self.context)
        stacked = torch.cat([x, low_res])[None].to(self.model.dtype).expand(count, -1, -1, -1)
        return stacked, torch.full((count,), step.timestep, device=x.device)

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
