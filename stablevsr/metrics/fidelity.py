"""PSNR, SSIM and tOF as in the public evaluation. Pictures are (n, 3, h, w) in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.nn.raft import RAFT
from stablevsr.sampling.flow import Padding

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
C1, C2 = 0.01**2, 0.03**2


def in_double(pictures: Tensor) -> Tensor:
    """In float64; on the CPU if the device is MPS, which lacks it."""
    return (pictures.cpu() if pictures.device.type == "mps" else pictures).double()


def psnr(result: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (n,); infinite for equal pictures."""
    result, truth = in_double(result), in_double(truth)
    return -10 * torch.log10((result - truth).square().mean((1, 2, 3)))


def ssim(result: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004), (n,): Gaussian window, reflected borders, RGB.

    Sides must be at least 6 pixels, for the reflection.
    """
    border = [WINDOW // 2] * 4
    result, truth = (F.pad(in_double(picture), border, mode="reflect") for picture in (result, truth))
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=result.device) - WINDOW // 2
    weights = torch.exp(-((offsets / SIGMA) ** 2) / 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, weights, groups=3), weights.mT, groups=3)

    mean_a, mean_b = local_mean(result), local_mean(truth)
    variance_a = local_mean(result**2) - mean_a**2
    variance_b = local_mean(truth**2) - mean_b**2
    covariance = local_mean(result * truth) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return (similarity / ((mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2))).mean((1, 2, 3))


@torch.no_grad()
def flow_back(raft: RAFT, frames: Tensor) -> Tensor:
    """The flow from each frame to the previous one, (n - 1, 2, h, w).

    As in the public evaluation, the network gets frames in [0, 1] (for upscaling it gets [-1, 1]).
    """
    padding = Padding.for_size(*frames.shape[-2:])
    frames = padding.pad(frames)
    return torch.cat([padding.crop(raft(b[None], a[None])) for a, b in zip(frames, frames[1:], strict=False)])


def tof(raft: RAFT, result: Tensor, truth: Tensor, true_flow: Tensor | None = None) -> Tensor:
    """tOF of each pair of neighbours, (n - 1,): the mean over pixels and components of |flow - true flow|, times 10.

    Args:
        true_flow: `flow_back` of the truth, if it is known already.
    """
    true_flow = flow_back(raft, truth) if true_flow is None else true_flow
    return 10 * (flow_back(raft, result) - true_flow).abs().mean((1, 2, 3))


def tlp(distances: Tensor, true_distances: Tensor) -> Tensor:
    """tLP from LPIPS between neighbouring frames of the result and of the truth, (n - 1,): |difference| times 1000."""
    return 1000 * (distances - true_distances).abs()
