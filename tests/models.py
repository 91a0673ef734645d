"""Small random models that several tests share."""

from dataclasses import replace
from pathlib import Path

import torch

from stablevsr import PRESETS
from stablevsr.architectures import LOW_RES_SCHEDULE, RAFT_SMALL, STABLEVSR_SCHEDULE
from stablevsr.config import ModelConfig, TCMConfig, TinyDecoderConfig, UNetConfig, UNetEncoderConfig, VAEConfig
from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.run import Run
from stablevsr.engine.store import MemoryStore
from stablevsr.model import StableVSR
from stablevsr.runtime import Offloaded
from stablevsr.sampling.noise import NoiseSource
from stablevsr.sampling.pictures import PictureFormat

# The released classes, as small as they go.
_TINY_ENCODER = UNetEncoderConfig(
    channels=(16, 16, 32, 32), blocks_per_level=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), context_dim=32, norm_groups=8
)
TINY = ModelConfig(
    unet=UNetConfig(_TINY_ENCODER),
    tcm=TCMConfig(_TINY_ENCODER, conditioning_widths=(8, 16, 16)),
    vae=VAEConfig(channels=(16, 16, 32), blocks_per_level=1, norm_groups=8),
    flow=RAFT_SMALL,
    tiny=TinyDecoderConfig(width=8, num_blocks=(1, 1, 1)),
    schedule=STABLEVSR_SCHEDULE,
)

DATA = Path(__file__).parent / "data"


def random_model(config: ModelConfig = TINY, seed: int = 0) -> StableVSR:
    """A model with random weights, its zero convolutions too, so that every part shows in the result."""
    torch.manual_seed(seed)
    model = StableVSR(config)
    torch.nn.init.normal_(model.empty_prompt)
    model.sampling = PRESETS["exact"]
    return model.requires_grad_(False).eval()


def offloaded(model: StableVSR) -> Offloaded:
    """As `build_model(offload=True)` gives it, on the CPU."""
    return Offloaded(model, torch.device("cpu"), [name for name, _, part in model.parts() if part.offloaded])


def memory_run(
    model: StableVSR, frames: torch.Tensor, noise: NoiseSource | None = None, **fields: object
) -> tuple[Run, MemoryStore]:
    """A run in memory over (n, h, w, 3) uint8 or (n, 3, h, w) float frames, not begun yet."""
    store = MemoryStore()
    size = frames.shape[2:] if frames.is_floating_point() else frames.shape[1:3]
    low_res = LowResFrames(store.hold("frames", frames), len(frames), tuple(size))
    config = model.sampling.with_fields(fields)
    return Run(model, store, config, low_res, noise=noise, format=PictureFormat(torch.float32)), store


def with_noise_levels(config: ModelConfig) -> ModelConfig:
    """The same model with the noise-level embedding of stock SD x4 upscalers, in UNet and TCM."""
    encoder = replace(config.unet.encoder, num_noise_levels=1000)
    return replace(
        config,
        unet=replace(config.unet, encoder=encoder),
        tcm=replace(config.tcm, encoder=encoder),
        low_res_schedule=LOW_RES_SCHEDULE,
    )
