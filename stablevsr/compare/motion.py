"""Motion and how well the versions follow it: optical flow in colour, and warping errors."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.utils import flow_to_image

from stablevsr.config import SCALE
from stablevsr.nn.warp import pixel_grid, warp
from stablevsr.sampling.flow import estimate_flow
from stablevsr.sampling.pictures import normalise

BRIGHTEST = 48  # mean difference over RGB, of 255, at the top of the colour scale
HIDDEN = (112, 128, 144)  # colour of occluded pixels
# From black through violet and orange to pale yellow: of rising brightness, readable without colour too.
COLOURS = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], np.float64)


@dataclass(frozen=True, eq=False)
class Motion:
    """The motion between a frame and the next, and the warping error of each version.

    flow: (4h, 4w, 3) uint8, hue for direction, saturation for speed.
    largest: the longest flow, in pixels.
    errors: (4h, 4w, 3) uint8 of each version.
    means: of |next frame warped along the flow - frame|, 0 to 255, over pixels visible in both (nan if there are none).
    hidden: the share of the other pixels.
    """

    frame: int
    flow: np.ndarray
    largest: float
    errors: list[np.ndarray]
    means: list[float]
    hidden: float


@torch.no_grad()
def follow(
    raft: nn.Module, frame: int, low_res: list[np.ndarray], versions: list[np.ndarray], following: list[np.ndarray]
) -> Motion:
    """Estimate the motion from a frame to the next and measure the warping error of each version.

    Args:
        raft: the flow network.
        low_res: the LR frame and the next one, (h, w, 3) uint8.
        versions, following: the versions of the frame and of the next one, (4h, 4w, 3) uint8.
    """
    device = next(raft.parameters()).device
    first, second = (normalise(torch.from_numpy(image.copy())[None]).to(device) for image in low_res)
    forward, backward = estimate_flow(raft, first, second), estimate_flow(raft, second, first)
    visible = _visible(forward, backward)
    errors, means = [], []
    for here, there in zip(versions, following, strict=True):
        warped = warp(_picture(there, device), forward, "bicubic")
        error = (warped - _picture(here, device)).abs().mean(1)[0]  # (4h, 4w)
        means.append(error[visible].mean().item())
        errors.append(_as_colour(error.cpu().numpy(), visible.cpu().numpy()))
    colours = flow_to_image(forward[0]).permute(1, 2, 0).cpu().numpy()
    return Motion(frame, colours, forward.norm(dim=1).max().item(), errors, means, 1 - visible.float().mean().item())


def _picture(image: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float()


def _visible(forward: Tensor, backward: Tensor) -> Tensor:
    """The pixels visible in the next frame too, (h, w), by forward-backward consistency.

    The criterion is that of Sundaram, Brox and Keutzer (2010), with a tolerance of half an LR pixel.
    """
    height, width = forward.shape[-2:]
    target = pixel_grid(forward) + forward
    inside = (target >= -0.5).all(1) & (target[:, 0] <= width - 0.5) & (target[:, 1] <= height - 0.5)
    back = warp(backward, forward, "bicubic")
    gap = (forward + back).square().sum(1)
    return (inside & (gap <= 0.01 * (forward.square().sum(1) + back.square().sum(1)) + (SCALE / 2) ** 2))[0]


def _as_colour(error: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """(h, w) of 0 to 255 as (h, w, 3) uint8 in `COLOURS`."""
    positions = np.linspace(0, BRIGHTEST, len(COLOURS))
    colours = np.stack([np.interp(error, positions, channel) for channel in COLOURS.T], -1).round().astype(np.uint8)
    colours[~visible] = HIDDEN
    return colours
