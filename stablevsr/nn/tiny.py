"""TAESD's decoder at f4: scaled latents to pictures with a fraction of the autoencoder's work, for guidance."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import TinyDecoderConfig
from stablevsr.nn.layers import double_and_convolve


class TinyBlock(nn.Module):
    """Three 3x3 convolutions with ReLU, and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.convs[0](x))
        y = F.relu(self.convs[1](y))
        return F.relu(self.convs[2](y) + x)


class TinyDecoder(nn.Module):
    """Blocks on three levels, each twice as large as the one before, all of one width; no norms, no attention."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.levels = nn.ModuleList(nn.ModuleList(TinyBlock(width) for _ in range(n)) for n in config.num_blocks)
        self.upsamples = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(len(config.num_blocks) - 1)
        )
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, latent: Tensor) -> Tensor:
        """(n, latent_channels, h, w), scaled to the diffusion's unit variance, to (n, 3, 4h, 4w), about [-1, 1]."""
        x = F.relu(self.conv_in(torch.tanh(latent / 3) * 3))
        for i, blocks in enumerate(self.levels):
            if i > 0:
                x = double_and_convolve(x, self.upsamples[i - 1])
            for block in blocks:
                x = block(x)
        return self.conv_out(x) * 2 - 1  # it was trained for [0, 1]
