"""What moves, and how well the versions move with it: optical flow as colour, and warping errors."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import flow_to_image

from stablevsr.config import SCALE
from stablevsr.nn.warp import pixel_grid
from stablevsr.sampling.flow import estimate_flow
from stablevsr.sampling.pictures import normalise

BRIGHTEST = 48  # mean difference over RGB, of 255, that is drawn in the last colour of the scale
HIDDEN = (112, 128, 144)  # colour where nothing can be said
# From black through violet and orange to pale yellow: ever brighter, so that it reads without colour too.
COLOURS = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], np.float64)


@dataclass(frozen=True, eq=False)
class Motion:
    """The motion between a frame and the next, and what is left of each version when it is followed.

    flow: (4h, 4w, 3) uint8, hue for direction, saturation for speed.
    largest: the longest flow, in pixels.
    errors: (4h, 4w, 3) uint8 of each version; means: of |next frame, fetched along the flow - frame|, 0 to 255, where
    a pixel is seen in both (nan when none is); hidden: the share of pixels that are not.
    """

    frame: int
    flow: np.ndarray
    largest: float
    errors: list[np.ndarray]
    means: list[float]
    hidden: float


@torch.no_grad()
def follow(
    raft: nn.Module, frame: int, low_res: list[np.ndarray], before: list[np.ndarray], after: list[np.ndarray]
) -> Motion:
    """Estimate the motion from a frame to the next and measure the versions along it.

    Args:
        raft: the flow network.
        low_res: the LR frame and the next one, (h, w, 3) uint8.
        before, after: the versions of the frame, and those of the next one, (4h, 4w, 3) uint8.
    """
    device = next(raft.parameters()).device
    first, second = (normalise(torch.from_numpy(image.copy())[None]).to(device) for image in low_res)
    forward, backward = estimate_flow(raft, first, second), estimate_flow(raft, second, first)
    seen = _seen(forward, backward)
    errors, means = [], []
    for here, there in zip(before, after, strict=True):
        error = (_fetch(_picture(there, device), forward) - _picture(here, device)).abs().mean(1)[0]  # (4h, 4w)
        means.append(error[seen].mean().item())
        errors.append(_as_colour(error.cpu().numpy(), seen.cpu().numpy()))
    colours = flow_to_image(forward[0]).permute(1, 2, 0).cpu().numpy()
    return Motion(frame, colours, forward.norm(dim=1).max().item(), errors, means, 1 - seen.float().mean().item())


def _picture(image: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float()


def _fetch(picture: Tensor, flow: Tensor) -> Tensor:
    """Pictures (n, c, h, w) along flows (n, 2, h, w), on the true grid: the sampler's is stretched at the borders."""
    if picture.device.type == "mps":  # whose grid_sample knows neither bicubic interpolation nor this padding
        return _fetch(picture.cpu(), flow.cpu()).to(picture)
    size = torch.tensor([picture.shape[-1], picture.shape[-2]], device=flow.device)[:, None, None]
    grid = 2 * (pixel_grid(flow) + flow + 0.5) / size - 1
    return F.grid_sample(picture, grid.permute(0, 2, 3, 1), mode="bicubic", padding_mode="border", align_corners=False)


def _seen(forward: Tensor, backward: Tensor) -> Tensor:
    """Which pixels the next frame shows too, (h, w): the way there and back ends where it began.

    The test is that of Sundaram, Brox and Keutzer (2010), with room for half a pixel of LR, which is all that LR tells.
    """
    height, width = forward.shape[-2:]
    target = pixel_grid(forward) + forward
    inside = (target >= -0.5).all(1) & (target[:, 0] <= width - 0.5) & (target[:, 1] <= height - 0.5)
    back = _fetch(backward, forward)
    gap = (forward + back).square().sum(1)
    return (inside & (gap <= 0.01 * (forward.square().sum(1) + back.square().sum(1)) + (SCALE / 2) ** 2))[0]


def _as_colour(error: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(h, w) of 0 to 255 as (h, w, 3) uint8 in `COLOURS`."""
    positions = np.linspace(0, BRIGHTEST, len(COLOURS))
    colours = np.stack([np.interp(error, positions, channel) for channel in COLOURS.T], -1).round().astype(np.uint8)
    colours[~seen] = HIDDEN
    return colours
