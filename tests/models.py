"""Small random models that several tests share."""

from dataclasses import replace
from pathlib import Path

import torch

from stablevsr.config import ModelConfig
from stablevsr.model import StableVSR
from stablevsr.presets import LOW_RES_SCHEDULE, TINY

DATA = Path(__file__).parent / "data"


def random_model(config: ModelConfig = TINY, seed: int = 0) -> StableVSR:
    """A model with random weights, its zero convolutions too, so that every part shows in the result."""
    torch.manual_seed(seed)
    model = StableVSR(config)
    torch.nn.init.normal_(model.empty_prompt)
    return model.requires_grad_(False).eval()


def with_noise_levels(config: ModelConfig) -> ModelConfig:
    """The same model with the noise-level embedding of stock SD x4 upscalers, in UNet and TCM."""
    encoder = replace(config.unet.encoder, num_noise_levels=1000)
    return replace(
        config,
        unet=replace(config.unet, encoder=encoder),
        tcm=replace(config.tcm, encoder=encoder),
        low_res_schedule=LOW_RES_SCHEDULE,
    )
