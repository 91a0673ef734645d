"""Structural type of the model that the sampler takes; declared here so that `sampling` need not import `model`."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from stablevsr.config import ModelConfig
from stablevsr.nn.raft import RAFT
from stablevsr.nn.tcm import TCM
from stablevsr.nn.tiny import TemporalTinyVAE, TinyDecoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE
from stablevsr.sampling.config import SamplingConfig


class Networks(Protocol):
    """The parts of a model, on one device."""

    config: ModelConfig
    sampling: SamplingConfig  # what the weights were made for
    unet: UNet
    tcm: TCM
    vae: VAE | TemporalTinyVAE
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

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
