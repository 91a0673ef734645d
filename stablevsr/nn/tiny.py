"""Tiny f4 autoencoders: the decoder of TAESD (Bohan 2023), and Stream-DiffVSR's temporal autoencoder.

Stacks of one kind of block on three levels of equal width, without norms or attention. They encode to and decode from
latents scaled for the diffusion process: there is no scaling factor to apply.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import TemporalTinyConfig, TinyDecoderConfig
from stablevsr.nn.layers import double_and_convolve

POOL = 4  # side of the squares that the TPM pools to one position
TPM_STRENGTH = 0.1  # weight of the fused features, which are added to a block's own


class TemporalProcessor(nn.Module):
    """Temporal processor module (TPM): mixes the warped features of the previous frame into a decoder block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        # Weight of the current frame. In the paper's figure it weights the previous one; trained this way.
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """
        Args:
            x: (n, width, h, w), the output of the block's convolutions for the current frame.
            previous: the previous frame's features, the same shape.

        Returns:
            x with the fused features added.
        """
        if min(x.shape[-2:]) < POOL:
            return x  # less than one position
        pooled = F.avg_pool2d(x, POOL)  # (n, width, h / 4, w / 4)
        # One sequence for both frames, row by row, the current frame first. Before the sum below, the two interact only
        # where the sequences join. A quirk of the published code, with which the weights were trained.
        sequence = torch.cat([pooled.flatten(2), F.avg_pool2d(previous, POOL).flatten(2)], dim=-1)
        current, past = self.convs[1](F.relu(self.convs[0](sequence))).chunk(2, dim=-1)
        fused = (self.alpha * current + (1 - self.alpha) * past).view_as(pooled)
        return x + TPM_STRENGTH * F.interpolate(fused, x.shape[-2:], mode="bilinear", align_corners=False)


class TinyBlock(nn.Module):
    """Three 3x3 convolutions with ReLU, and a skip."""

    def __init__(self, width: int, temporal: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.temporal = TemporalProcessor(width) if temporal else None

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """(n, width, h, w) to the same shape, which `previous` has too; `previous` goes through the TPM."""
        y = F.relu(self.convs[0](x))
        y = F.relu(self.convs[1](y))
        y = self.convs[2](y)
        if previous is not None:
            assert self.temporal is not None, "only temporal blocks take the previous frame's features"
            y = self.temporal(y, previous)
        return F.relu(y + x)


def _levels(width: int, counts: Sequence[int], temporal: bool) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleList(TinyBlock(width, temporal) for _ in range(count)) for count in counts)


class TinyDecoder(nn.Module):
    """The decoder of TAESD: blocks on three levels, with upsampling by two in between."""

    def __init__(self, config: TinyDecoderConfig, temporal: bool = False) -> None:
        super().__init__()
        width = config.width
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.levels = _levels(width, config.num_blocks, temporal)
        self.upsamples = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(len(config.num_blocks) - 1)
        )
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, latent: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """
        Args:
            latent: (n, latent_channels, h, w), scaled to the diffusion's unit variance.
            features: of the previous frame, one per block in order; empty to decode the frame on its own.

        Returns:
            (n, 3, 4h, 4w), about [-1, 1], not clamped.
        """
        remaining = iter(features)
        x = F.relu(self.conv_in(torch.tanh(latent / 3) * 3))
        for i, blocks in enumerate(self.levels):
            if i > 0:
                # A ModuleList hides the class of its entries from the type checker.
                x = self._upsample(x, cast(nn.Conv2d, self.upsamples[i - 1]))
            for block in blocks.children():
                x = block(x, next(remaining, None))
        return self.conv_out(x) * 2 - 1  # it was trained for [0, 1]

    def _upsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return double_and_convolve(x, conv)


class TemporalTinyDecoder(TinyDecoder):
    """The decoder with a TPM in every block. Without features it matches diffusers' AutoencoderTiny bit for bit."""

    def __init__(self, config: TemporalTinyConfig) -> None:
        super().__init__(config, temporal=True)

    def _upsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        # In two steps, for `double_and_convolve` rounds differently.
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TemporalTinyEncoder(nn.Module):
    """The mirror of the decoder. The published files contain its TPMs, but they are never used."""

    def __init__(self, config: TemporalTinyConfig) -> None:
        super().__init__()
        width, counts = config.width, config.num_blocks[::-1]
        self.conv_in = nn.Conv2d(config.image_channels, width, 3, padding=1)
        self.levels = _levels(width, counts, temporal=True)
        self.downsamples = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) for _ in range(len(counts) - 1)
        )
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, picture: Tensor) -> list[Tensor]:
        """(n, 3, 4h, 4w) to the output of every block, finest first: (n, width, 4h, 4w) to (n, width, h, w)."""
        x, outputs = self.conv_in(picture), []
        for i, blocks in enumerate(self.levels):
            if i > 0:
                x = self.downsamples[i - 1](x)
            for block in blocks.children():
                x = block(x)
                outputs.append(x)
        return outputs


class TemporalTinyVAE(nn.Module):
    """Stream-DiffVSR's autoencoder: a frame is decoded with the features of the previous one (its section on TPM)."""

    scaling_factor = 1.0  # as of `VAE`: its latents are scaled already

    def __init__(self, config: TemporalTinyConfig) -> None:
        super().__init__()
        self.encoder = TemporalTinyEncoder(config)
        self.decoder = TemporalTinyDecoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def encode(self, picture: Tensor) -> Tensor:
        """(n, 3, 4h, 4w) in [-1, 1] to its latent (n, latent_channels, h, w); there is no posterior to draw from."""
        return self.encoder.conv_out(self.encoder((picture + 1) / 2)[-1])

    def features(self, condition: Tensor) -> list[Tensor]:
        """The features of the previous frame that `decode` takes.

        Unlike in `encode`, the picture is not mapped to [0, 1] first: the TPMs were trained with [-1, 1].

        Args:
            condition: (n, 3, 4h, 4w), the previous decoded frame warped onto this one, about [-1, 1].

        Returns:
            One tensor per block of the decoder, in its order: at LR size, x2 and x4.
        """
        return self.encoder(condition)[::-1]

    def decode(self, latent: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """(n, latent_channels, h, w), with or without `features`, to (n, 3, 4h, 4w), about [-1, 1], not clamped."""
        return self.decoder(latent, features)
