"""Match a result to its LR frame: diffusion models tend to shift colors, and autoencoders lose detail.

All fixes compare at LR size, where a correct result equals the LR frame and so stays unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.sampling.pictures import bicubic

LEVELS = 3  # of the wavelet: details up to 4 LR pixels (16 HR pixels, as in StableSR's five levels) stay unchanged
PROJECTED = 0.5  # share of the way to the LR frame: all of it would bring back compression that the model removed


def fix_colors(picture: Tensor, low_res: Tensor, kind: str | None) -> Tensor:
    """`picture`, matched to its LR frame.

    Args:
        picture: (n, 3, 4h, 4w) in [0, 1].
        low_res: (n, 3, h, w) in [0, 1].
        kind: "wavelet" takes the low frequencies of the LR frame (StableSR, Wang et al. 2023); "adain" takes mean and
            standard deviation of each channel (Huang and Belongie 2017); "backprojection" takes half of all that
            differs at LR size, one relaxed step of iterative back-projection (Irani and Peleg 1991); None changes
            nothing.
    """
    return picture if kind is None else (picture + correction(picture, low_res, kind)).clamp(0, 1)


def correction(picture: Tensor, low_res: Tensor, kind: str) -> Tensor:
    """What `fix_colors` adds, before clamping: (n, 3, 4h, 4w), differentiable.

    Args: as of `fix_colors`, but both in any range, the same for both.
    """
    small = F.interpolate(picture, size=low_res.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
    if kind == "adain":
        return bicubic(restyled(small, low_res) - small)
    missing = low_res - small
    return bicubic(coarse(missing) if kind == "wavelet" else PROJECTED * missing)


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
