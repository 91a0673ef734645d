"""The f4 autoencoder of the SD x4 upscaler."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import VAEConfig
from stablevsr.nn.attention import NORM_EPS, SpatialAttention
from stablevsr.nn.layers import ResBlock, double_and_convolve


class Posterior(NamedTuple):
    """The encoder's diagonal Gaussian over unscaled latents."""

    mean: Tensor  # (n, latent_channels, h, w)
    log_variance: Tensor  # the same shape, clamped to [-30, 20]

    def sample(self, noise: Tensor) -> Tensor:
        """The reparameterised sample for unit Gaussian `noise` of the same shape."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class MidBlock(nn.Module):
    """Two residual blocks around attention over all positions."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, norm_groups, NORM_EPS)
        self.attention = SpatialAttention(channels, norm_groups)
        self.block_2 = ResBlock(channels, channels, norm_groups, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks, then down- or upsampling except in the last level."""

    def __init__(
        self, in_channels: int, channels: int, count: int, norm_groups: int, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(in_channels if i == 0 else channels, channels, norm_groups, NORM_EPS) for i in range(count)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Downsample(nn.Module):
    """A stride-2 convolution, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DoubleSize(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return double_and_convolve(x, self.conv)


class Encoder(nn.Module):
    """Picture to mean and log-variance of its latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            resample = Downsample(width) if i < len(channels) - 1 else None
            self.levels.append(Level(channels[max(i - 1, 0)], width, config.blocks_per_level, groups, resample))
        self.middle = MidBlock(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x)), inplace=True))


class Decoder(nn.Module):
    """Latent to picture."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.middle = MidBlock(channels[0], groups)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            resample = DoubleSize(width) if i < len(channels) - 1 else None
            self.levels.append(Level(channels[max(i - 1, 0)], width, config.blocks_per_level + 1, groups, resample))
        self.norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class VAE(nn.Module):
    """Encoder and decoder with their 1x1 convolutions around the latent.

    `encode` and `decode` use unscaled latents; `scaling_factor` brings them to the unit variance that the diffusion
    process expects: z = scaling_factor * latent.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        latent = config.latent_channels
        self.scaling_factor = config.scaling_factor
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    def encode(self, picture: Tensor) -> Posterior:
        """(n, 3, 4h, 4w) in [-1, 1] to the posterior over (n, latent_channels, h, w)."""
        mean, log_variance = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def decode(self, latent: Tensor) -> Tensor:
        """(n, latent_channels, h, w), unscaled, to (n, 3, 4h, 4w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent))
