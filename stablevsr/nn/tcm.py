"""The Temporal Conditioning Module (paper, section 4.1): a ControlNet conditioned on the warped neighbouring frame."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.config import TCMConfig
from stablevsr.nn.attention import Context
from stablevsr.nn.unet import Residuals, UNetEncoder


class ConditioningEmbedding(nn.Module):
    """Convolutions from the HR condition to the LR grid; each change of width halves the size."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.convs = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:], strict=False):
            self.convs.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.convs.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """(n, in_channels, 4h, 4w) to (n, out_channels, h, w)."""
        x = F.silu(self.conv_in(picture), inplace=True)
        for conv in self.convs:
            x = F.silu(conv(x), inplace=True)
        return self.conv_out(x)


class TCM(nn.Module):
    """A copy of the UNet's encoder and middle, with a condition added and a zero convolution on each output."""

    def __init__(self, config: TCMConfig) -> None:
        super().__init__()
        encoder = config.encoder
        self.encoder = UNetEncoder(encoder)
        self.conditioning = ConditioningEmbedding(
            config.conditioning_channels, config.conditioning_widths, encoder.channels[0]
        )
        self.zero_convs = nn.ModuleList(nn.Conv2d(width, width, 1) for width in encoder.skip_channels)
        self.zero_conv_middle = nn.Conv2d(encoder.channels[-1], encoder.channels[-1], 1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        picture: Tensor | None,
        scale: float = 1.0,
        noise_level: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Residuals:
        """
        Args:
            x, timestep, context, noise_level: as in `UNetEncoder.forward`.
            picture: (n, 3, 4h, 4w), the neighbour's decoded x0 estimate warped onto this frame, about [-1, 1].
            scale: multiplies the residuals (the conditioning scale).
            embedding: the result of `embed`, in place of the picture, where several steps share one.
        """
        embedding = self.conditioning(picture) if embedding is None else embedding
        features = self.encoder(x, timestep, context, noise_level, embedding)
        skips = [conv(skip) * scale for conv, skip in zip(self.zero_convs, features.skips, strict=True)]
        return Residuals(skips, self.zero_conv_middle(features.middle) * scale)

    def embed(self, picture: Tensor) -> Tensor:
        """The embedding of the condition: (n, 3, 4h, 4w) to (n, channels[0], h, w)."""
        return self.conditioning(picture)

    def zero(self) -> None:
        """Zero the layers that ControlNets initialise with zeros: the TCM then adds nothing (paper, section 4.1)."""
        for conv in (*self.zero_convs, self.zero_conv_middle, self.conditioning.conv_out):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)


def starting_state(config: TCMConfig, unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The initial parameters of a TCM for training: the UNet's encoder, and zero convolutions.

    The conditioning convolutions have no counterpart in the UNet: they are random, from a fixed seed.

    Args:
        unet: the UNet's state dict, whose dtype the result gets.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tcm = TCM(config)
    tcm.zero()
    dtype = next(iter(unet.values())).dtype
    start = {name: tensor.to(dtype) for name, tensor in tcm.state_dict().items()}
    # Cloned, because the two must not share memory: one will be trained, and safetensors refuses shared tensors.
    return start | {name: tensor.clone() for name, tensor in unet.items() if name.startswith("encoder.")}
