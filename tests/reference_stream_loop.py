"""Stream-DiffVSR's loop on the modules of diffusers and torchvision: what streaming's speed is measured against."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler
from reference_loop import Part, published_warp
from references import library_twin
from torch import Tensor, nn

from stablevsr.config import TemporalTinyConfig
from stablevsr.convert.keys import diffusers_temporal_tiny, rename_all
from stablevsr.convert.published_config import write_schedule
from stablevsr.model import StableVSR
from stablevsr.nn.tiny import TemporalTinyVAE
from stablevsr.sampling.flow import Padding
from stablevsr.sampling.noise import NoiseSource
from stablevsr.sampling.pictures import bicubic


class Processor(nn.Module):
    """What a block of the published autoencoder has beside the library's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.temporal_processor = nn.Sequential(next(convs), nn.ReLU(), next(convs))
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, y: Tensor, previous: Tensor) -> Tensor:
        n, c, h, w = y.shape
        current, past = F.avg_pool2d(y, 4), F.avg_pool2d(previous, 4)
        rows, columns = current.shape[2:]
        both = torch.stack([current.view(n, c, -1), past.view(n, c, -1)], dim=2).view(n, c, -1)
        current, past = self.temporal_processor(both).view(n, c, 2, -1).unbind(2)
        fused = (self.alpha * current + (1 - self.alpha) * past).view(n, c, rows, columns)
        return y + 0.1 * F.interpolate(fused, size=(h, w), mode="bilinear", align_corners=False)


class ReferenceTemporalVAE(nn.Module):
    """The library's AutoencoderTiny with a copy of our weights, and the published processors between its layers."""

    def __init__(self, ours: TemporalTinyVAE, config: TemporalTinyConfig) -> None:
        super().__init__()
        widths = (config.width,) * len(config.num_blocks)
        self.library = AutoencoderTiny(
            latent_channels=config.latent_channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=config.num_blocks[::-1],
            num_decoder_blocks=config.num_blocks,
        )
        layers = self.library.decoder.layers
        self.blocks = [i for i, layer in enumerate(layers) if hasattr(layer, "fuse")]
        self.processors = nn.ModuleDict({str(i): Processor(config.width) for i in self.blocks})
        state = ours.state_dict()
        names = rename_all(state, diffusers_temporal_tiny(config))
        published = {names[name]: tensor.clone() for name, tensor in state.items()}
        self.library.load_state_dict({key: published[key] for key in self.library.state_dict()})
        for i, processor in self.processors.items():
            processor.load_state_dict({key: published[f"decoder.layers.{i}.{key}"] for key in processor.state_dict()})
        self.to(ours.decoder.conv_in.weight).requires_grad_(False).eval()

    def features(self, picture: Tensor) -> list[Tensor]:
        """In the encoder's order; of [-1, 1], which the library's encoder would map first."""
        x, found = picture, []
        for layer in self.library.encoder.layers:
            x = layer(x)
            if hasattr(layer, "fuse"):
                found.append(x)
        return found

    def decode(self, latent: Tensor, features: list[Tensor] | None) -> Tensor:
        if features is None:
            return self.library.decode(latent).sample
        x, past = torch.tanh(latent / 3) * 3, dict(zip(self.blocks, features[::-1], strict=True))
        for i, layer in enumerate(self.library.decoder.layers):
            if i in past:
                y = self.processors[str(i)](layer.conv(x), past[i])
                x = layer.fuse(y + layer.skip(x))
            else:
                x = layer(x)
        return x.mul(2).sub(1)


class ReferenceStreamLoop:
    """The published algorithm on our weights, in the published order: all flows first, nothing kept between steps.

    Args:
        model: whose weights are copied.
        part: a context manager around each part of the work, by name, for a stopwatch.
    """

    def __init__(self, model: StableVSR, part: Part = lambda name: nullcontext()) -> None:
        config = model.config
        self.unet, self.tcm = library_twin(model.unet, config.unet), library_twin(model.tcm, config.tcm)
        self.vae, self.raft = ReferenceTemporalVAE(model.vae, config.vae), library_twin(model.flow, config.flow)
        self.scheduler = DDIMScheduler.from_config(write_schedule(config.schedule))
        self.device, self.part, self.num_updates = model.device, part, config.flow.num_updates

    @torch.no_grad()
    def run(self, low_res: Tensor, noise: NoiseSource, steps: int, context: Tensor, tcm_scale: float = 1.0) -> Tensor:
        """
        Args:
            low_res: (n, 3, h, w) in [-1, 1].
            context: (1, tokens, width).

        Returns:
            (n, 3, 4h, 4w), the decoded pictures, about [-1, 1], on the CPU.
        """
        low_res = low_res.to(self.device)
        with self.part("flow"):
            high_res = [bicubic(frame[None]) for frame in low_res]
            flows = [self._flow(*pair) for pair in zip(high_res[1:], high_res[:-1], strict=True)]
        latents = [noise.initial(i).to(self.device)[None] for i in range(len(low_res))]
        self.scheduler.set_timesteps(steps)
        pictures: list[Tensor] = []
        for i, latent in enumerate(latents):
            condition = None
            if i > 0:
                with self.part("warp"):
                    condition = published_warp(pictures[-1], flows[i - 1])
            for time in self.scheduler.timesteps:
                latent = self._step(latent, low_res[i : i + 1], time, context, condition, tcm_scale)
            with self.part("decode"):
                features = None if condition is None else self.vae.features(condition)
                pictures.append(self.vae.decode(latent, features))
        return torch.cat(pictures).cpu()

    def _step(
        self, latent: Tensor, low_res: Tensor, time: Tensor, context: Tensor, condition: Tensor | None, scale: float
    ) -> Tensor:
        x, time_of_x, extra = torch.cat([latent, low_res], dim=1), time.to(self.device), {}
        if condition is not None:
            with self.part("TCM"):
                skips, middle = self.tcm(x, time_of_x, context, condition, scale, return_dict=False)
            extra = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        with self.part("UNet"):
            prediction = self.unet(x, time_of_x, context, **extra).sample
        with self.part("schedule"):
            return self.scheduler.step(prediction, time, latent).prev_sample

    def _flow(self, target: Tensor, source: Tensor) -> Tensor:
        padding = Padding.for_size(*target.shape[-2:])
        found = self.raft(padding.pad(target), padding.pad(source), num_flow_updates=self.num_updates)
        return padding.crop(found[-1])
