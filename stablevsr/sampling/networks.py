"""What the sampler needs of a model. `stablevsr.model.StableVSR` is one; the rooms' order keeps it out of here."""

from typing import Protocol

import torch
from torch import Tensor

from stablevsr.config import ModelConfig
from stablevsr.nn.raft import RAFT
from stablevsr.nn.tcm import TCM
from stablevsr.nn.tiny import TinyDecoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE


class Networks(Protocol):
    """The parts of a model, on one device."""

    config: ModelConfig
    unet: UNet
    tcm: TCM
    vae: VAE
    flow: RAFT | None  # float32
    tiny: TinyDecoder | None

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of UNet and TCM; the VAE has its own."""
        ...

    def encode_prompt(self, prompt: str | None) -> Tensor:
        """The context of a prompt, (1, tokens, width); None is the empty prompt."""
        ...
