"""The SD x4 UNet (Rombach et al. 2022), split where StableVSR adds to it: encoder and middle, then decoder.

The encoder is independent of the TCM, so it can run ahead of the frames of a pass, or batched over them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import UNetConfig, UNetEncoderConfig
from stablevsr.nn.attention import Context, Transformer
from stablevsr.nn.layers import ResBlock, TimeEmbedding, Upsample


class Residuals(NamedTuple):
    """What the TCM adds to the UNet: one tensor per skip, and one for the middle."""

    skips: list[Tensor]
    middle: Tensor


class Features(NamedTuple):
    """The encoder's outputs, for the UNet's decoder or the TCM's zero convolutions."""

    skips: list[Tensor]  # (n, c_i, h_i, w_i), finest first
    middle: Tensor  # (n, c, h, w)
    time: Tensor  # (n, time_dim), the embedding of timestep and noise level

    def plus(self, residuals: Residuals | None) -> "Features":
        """These features with the TCM's residuals added, if there are any."""
        if residuals is None:
            return self
        skips = [skip + extra for skip, extra in zip(self.skips, residuals.skips, strict=True)]
        return Features(skips, self.middle + residuals.middle, self.time)


def _res_block(config: UNetEncoderConfig, in_channels: int, out_channels: int) -> ResBlock:
    return ResBlock(in_channels, out_channels, config.norm_groups, config.norm_eps, config.time_dim)


def _transformer(config: UNetEncoderConfig, level: int, only_cross_attention: bool) -> Transformer:
    return Transformer(
        config.channels[level],
        config.context_dim,
        config.num_heads[level],
        config.transformer_depth[level],
        config.norm_groups,
        config.linear_projection,
        only_cross_attention,
    )


def _transformers(config: UNetEncoderConfig, level: int, count: int) -> nn.ModuleList:
    """`count` transformers for a level with attention, none for one without."""
    number = count if config.attention[level] else 0
    return nn.ModuleList(_transformer(config, level, config.only_cross_attention[level]) for _ in range(number))


class EncoderLevel(nn.Module):
    """Residual blocks, each with a transformer where the level has attention, then a stride-2 convolution."""

    def __init__(self, config: UNetEncoderConfig, level: int) -> None:
        super().__init__()
        in_channels = config.channels[max(level - 1, 0)]
        channels = config.channels[level]
        count = config.blocks_per_level[level]
        self.blocks = nn.ModuleList(
            _res_block(config, in_channels if i == 0 else channels, channels) for i in range(count)
        )
        self.transformers = _transformers(config, level, count)
        last = level == len(config.channels) - 1
        self.downsample = None if last else nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Context, skips: list[Tensor]) -> Tensor:
        """Appends its feature maps to `skips` and returns the last one."""
        for i, block in enumerate(self.blocks):
            x = block(x, time)
            if self.transformers:
                x = self.transformers[i](x, context)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks around a transformer, which self-attends even where the last level attends to text only."""

    def __init__(self, config: UNetEncoderConfig) -> None:
        super().__init__()
        channels = config.channels[-1]
        self.block_1 = _res_block(config, channels, channels)
        self.transformer = _transformer(config, len(config.channels) - 1, only_cross_attention=False)
        self.block_2 = _res_block(config, channels, channels)

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        return self.block_2(self.transformer(self.block_1(x, time), context), time)


class UNetEncoder(nn.Module):
    """Embeddings of time and noise level, encoder levels and middle: what the UNet and the TCM share."""

    def __init__(self, config: UNetEncoderConfig) -> None:
        super().__init__()
        first = config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, config.time_dim, config.cos_first, config.freq_shift)
        levels = config.num_noise_levels
        self.noise_level_embedding = None if levels is None else nn.Embedding(levels, config.time_dim)
        self.levels = nn.ModuleList(EncoderLevel(config, level) for level in range(len(config.channels)))
        self.middle = MidBlock(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        noise_level: Tensor | None = None,
        conditioning: Tensor | None = None,
    ) -> Features:
        """
        Args:
            x: (n, in_channels, h, w), noisy latent and LR frame stacked.
            timestep: (n,) integers in [0, num_train_timesteps).
            context: (n, tokens, context_dim), the text; a `CachedContext` computes its keys and values once.
            noise_level: (n,) integers, required if the model embeds the noise level of the LR frame.
            conditioning: (n, channels[0], h, w), added after the first convolution (the TCM's condition).
        """
        time = self.time_embedding(timestep)
        if self.noise_level_embedding is not None:
            if noise_level is None:
                raise ValueError("this network embeds the noise level of the LR frame: pass noise_level")
            time = time + self.noise_level_embedding(noise_level)
        x = self.conv_in(x)
        if conditioning is not None:
            x = x + conditioning
        skips = [x]
        for level in self.levels:
            x = level(x, time, context, skips)
        return Features(skips, self.middle(x, time, context), time)


class DecoderLevel(nn.Module):
    """Residual blocks with one skip each, and transformers where the level has attention, then upsampling."""

    def __init__(self, config: UNetEncoderConfig, level: int, skip_channels: tuple[int, ...]) -> None:
        super().__init__()
        channels = config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        self.blocks = nn.ModuleList(
            _res_block(config, (below if i == 0 else channels) + skip, channels) for i, skip in enumerate(skip_channels)
        )
        self.transformers = _transformers(config, level, len(skip_channels))
        self.upsample = Upsample(channels) if level > 0 else None

    def forward(self, x: Tensor, time: Tensor, context: Context, skips: list[Tensor]) -> Tensor:
        """Pops its skips off the end of `skips`."""
        for i, block in enumerate(self.blocks):
            x = block(torch.cat([x, skips.pop()], dim=1), time)
            if self.transformers:
                x = self.transformers[i](x, context)
        if self.upsample is not None:
            # To the size of the next skip rather than twice the current one: any LR size works (180 -> 90 -> 45 -> 23).
            x = self.upsample(x, skips[-1].shape[-2:])
        return x


class UNetDecoder(nn.Module):
    """From features to the prediction, coarsest level first."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        encoder = config.encoder
        skips = list(encoder.skip_channels)
        levels = []
        for level in reversed(range(len(encoder.channels))):
            count = encoder.blocks_per_level[level] + 1
            levels.append(DecoderLevel(encoder, level, tuple(skips.pop() for _ in range(count))))
        self.levels = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(encoder.norm_groups, encoder.channels[0], encoder.norm_eps)
        self.conv_out = nn.Conv2d(encoder.channels[0], config.out_channels, 3, padding=1)

    def forward(self, features: Features, context: Context) -> Tensor:
        skips, x = list(features.skips), features.middle
        for level in self.levels:
            x = level(x, features.time, context, skips)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class UNet(nn.Module):
    """The denoising network: noisy latent and LR frame in; epsilon, v or x0 out, depending on the schedule."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.encoder = UNetEncoder(config.encoder)
        self.decoder = UNetDecoder(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        noise_level: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """
        Args:
            x: (n, in_channels, h, w), noisy latent and LR frame stacked.
            timestep, context, noise_level: as in `UNetEncoder.forward`.
            residuals: what the TCM adds to skips and middle; None for the UNet alone.

        Returns:
            (n, out_channels, h, w), the prediction.
        """
        return self.decoder(self.encoder(x, timestep, context, noise_level).plus(residuals), context)
