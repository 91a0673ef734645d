"""Match the colors of a result to its LR frame: diffusion models tend to shift them.

Both fixes compare at LR size, where a correct result equals the LR frame and so stays unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.sampling.pictures import bicubic

LEVELS = 3  # of the wavelet: details up to 4 LR pixels (16 HR pixels, as in StableSR's five levels) stay unchanged


def fix_colors(picture: Tensor, low_res: Tensor, kind: str | None) -> Tensor:
    """`picture` with the colors of its LR frame.

    Args:
        picture: (n, 3, 4h, 4w) in [0, 1].
        low_res: (n, 3, h, w) in [0, 1].
        kind: "wavelet" takes the low frequencies of the LR frame (StableSR, Wang et al. 2023); "adain" takes mean and
            standard deviation of each channel (Huang and Belongie 2017); None changes nothing.
    """
    if kind is None:
        return picture
    small = F.interpolate(picture, size=low_res.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
    change = coarse(low_res - small) if kind == "wavelet" else restyled(small, low_res) - small
    return (picture + bicubic(change)).clamp(0, 1)


def coarse(x: Tensor) -> Tensor:
    """Low frequencies of (n, c, h, w) after LEVELS levels of an undecimated wavelet: blurs, each twice as wide."""
    line = x.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    for level in range(LEVELS):
        reach = 2**level
        x = F.conv2d(F.pad(x, (reach,) * 4, mode="replicate"), kernel, dilation=reach, groups=x.shape[1])
    return x


def restyled(x: Tensor, style: Tensor) -> Tensor:
    """`x`, (n, c, h, w), with the mean and standard deviation of each channel of `style`."""
    std, mean = torch.std_mean(x, dim=(2, 3), correction=0, keepdim=True)
    style_std, style_mean = torch.std_mean(style, dim=(2, 3), correction=0, keepdim=True)
    return (x - mean) * style_std / std.clamp(min=1e-4) + style_mean
