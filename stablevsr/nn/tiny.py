"""Tiny autoencoders at f4: the decoder of TAESD (Bohan 2023), and Stream-DiffVSR's autoencoder with memory.

All are stacks of one block on three levels, of one width, without norms or attention. They encode to and decode from
the diffusion's own latents: there is no scaling factor to apply.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import TemporalTinyConfig, TinyDecoderConfig
from stablevsr.nn.layers import double_and_convolve

POOL = 4  # pixels of a level's grid, each way, that are one position for the TPM
TPM_STRENGTH = 0.1  # of the previous frame's features beside a block's own


class TemporalProcessor(nn.Module):
    """Temporal processor module (TPM): mixes the previous frame's features, warped, into a decoder block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        # Weight of the current frame. The paper's figure has it at the previous one; the weights were trained so.
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """
        Args:
            x: (n, width, h, w), what the block's convolutions make of the current frame.
            previous: the previous frame's features, the same shape.

        Returns:
            x with the fused features added.
        """
        if min(x.shape[-2:]) < POOL:
            return x  # not one position: there is nothing to add
        pooled = F.avg_pool2d(x, POOL)  # (n, width, h / 4, w / 4)
        # One sequence for both frames, row after row, the current frame first. The two meet in the sum below; before
        # it, only where the sequences join. A quirk of the published code that the weights were trained with.
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
        """(n, width, h, w) to the same; `previous`, of that shape too, goes through the TPM."""
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
    """Blocks on three levels, each twice as large as the one before, all of one width; no norms, no attention."""

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
            features: of the previous frame, one for each block, in the blocks' order; none decodes the frame alone.

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
    """The decoder with a TPM in every block. Without features its bits are those of diffusers' AutoencoderTiny."""

    def __init__(self, config: TemporalTinyConfig) -> None:
        super().__init__(config, temporal=True)

    def _upsample(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        # The two steps of `double_and_convolve`, which rounds differently, apart.
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TemporalTinyEncoder(nn.Module):
    """The decoder's mirror. Its TPMs are in the published files, and never used."""

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
    """Stream-DiffVSR's autoencoder: a picture is decoded with the features of the one before (its section on TPM)."""

    scaling_factor = 1.0  # for callers that divide by the VAE's: it decodes the diffusion's own latents

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
        """What `decode` takes of the previous frame.

        The picture goes into the encoder as it is, in [-1, 1], without the mapping to [0, 1] that `encode` does: the
        TPMs were trained with that.

        Args:
            condition: (n, 3, 4h, 4w), the previous decoded picture warped onto this frame, about [-1, 1].

        Returns:
            One tensor for each block of the decoder, in its order: LR size, twice, four times as large.
        """
        return self.encoder(condition)[::-1]

    def decode(self, latent: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """(n, latent_channels, h, w), and `features` or none, to (n, 3, 4h, 4w), about [-1, 1], not clamped."""
        return self.decoder(latent, features)
