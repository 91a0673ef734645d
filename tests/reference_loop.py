"""The public pipeline's loop, written with the modules of diffusers and torchvision: what speed is measured against."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import torch.nn.functional as F
from references import library_twin
from torch import Tensor

from stablevsr.model import StableVSR
from stablevsr.sampling.noise import NoiseSource

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Part = Callable[[str], AbstractContextManager]


class ReferenceLoop:
    """The published algorithm on our weights, step by step as its code does it: nothing batched, cached or compiled.

    Args:
        model: whose weights are copied.
        part: a context manager around each part of the work, by name, for a stopwatch.
    """

    def __init__(self, model: StableVSR, part: Part = lambda name: nullcontext()) -> None:
        config = model.config
        self.unet, self.tcm = library_twin(model.unet, config.unet), library_twin(model.tcm, config.tcm)
        self.vae, self.raft = library_twin(model.vae, config.vae), library_twin(model.flow, config.flow)
        self.config, self.device, self.dtype, self.part = config, model.device, model.dtype, part

    @torch.no_grad()
    def run(self, low_res: Tensor, noise: NoiseSource, steps: int, context: Tensor, tcm_scale: float = 1.0) -> Tensor:
        """
        Args:
            low_res: (n, 3, h, w) in [-1, 1].
            context: (1, tokens, width).

        Returns:
            (n, 3, 4h, 4w) in [0, 1], on the CPU.
        """
        low_res = low_res.to(self.device)
        with self.part("flow"):
            forward, backward = self._flows(low_res)
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(**asdict(self.config.schedule))
        scheduler.set_timesteps(steps)
        n = len(low_res)
        latents = [noise.initial(i).to(self.device)[None] for i in range(n)]
        with self.part("denoise"):
            for index, time in enumerate(scheduler.timesteps):
                x0 = None
                for frame in range(n) if index % 2 == 0 else range(n - 1, -1, -1):
                    guidance = None
                    if x0 is not None:
                        with self.part("decode"):
                            picture = self._decode(x0)
                        with self.part("warp"):
                            flow = forward[frame - 1] if index % 2 == 0 else backward[frame]
                            guidance = published_warp(picture, flow)
                    latents[frame], x0 = self._frame_step(
                        scheduler,
                        time,
                        latents[frame],
                        low_res[frame],
                        guidance,
                        noise.step(index, frame),
                        context,
                        tcm_scale,
                    )
        with self.part("final decode"):
            return torch.cat([(self._decode(latent) / 2 + 0.5).clamp(0, 1).float().cpu() for latent in latents])

    def _frame_step(
        self,
        scheduler: "DDPMScheduler",
        time: Tensor,
        latent: Tensor,
        low_res: Tensor,
        guidance: Tensor | None,
        draw: Tensor,
        context: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """x at the next timestep, and the clean estimate."""
        x = torch.cat([latent, low_res[None]], dim=1).to(self.dtype)
        time_of_x, extra = time.to(self.device), {}
        if guidance is not None:
            with self.part("TCM"):
                skips, middle = self.tcm(x, time_of_x, context, guidance, scale, return_dict=False)
            extra = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        with self.part("UNet"):
            prediction = self.unet(x, time_of_x, context, **extra).sample
        with self.part("schedule"), patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: draw):
            draw = draw[None].to(self.device)
            result = scheduler.step(prediction.float(), time, latent)
        return result.prev_sample, result.pred_original_sample

    def _flows(self, low_res: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Flows that fetch frame i onto frame i + 1, and the other way round."""
        large = F.interpolate(low_res, scale_factor=4, mode="bicubic")
        height, width = large.shape[-2:]
        # The published code needs sides that are multiples of 8, and 128 at least.
        right, bottom = (max(-(-side // 8) * 8, 128) - side for side in (width, height))
        large = F.pad(large, (0, right, 0, bottom), mode="replicate")

        def flow(target: Tensor, source: Tensor) -> Tensor:
            found = self.raft(target[None], source[None], num_flow_updates=self.config.flow.num_updates)
            return found[-1][..., :height, :width]

        pairs = list(zip(large, large[1:], strict=False))
        return [flow(b, a) for a, b in pairs], [flow(a, b) for a, b in pairs]

    def _decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent.to(self.vae.dtype) / self.vae.config.scaling_factor).sample


def published_warp(picture: Tensor, flow: Tensor) -> Tensor:
    """`picture` (1, c, h, w) fetched along `flow` (1, 2, h, w), with the published grid."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    size = torch.tensor([width - 1, height - 1], device=flow.device)
    grid = 2 * (torch.stack([x, y], dim=-1)[None] + flow.permute(0, 2, 3, 1)) / size - 1
    warped = F.grid_sample(picture.to(flow.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.to(picture.dtype)
