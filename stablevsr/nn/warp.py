"""Pixel grids, and backward warping by optical flow."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_grid(like: Tensor) -> Tensor:
    """Pixel coordinates (1, 2, h, w), x then y, of the grid of a (n, c, h, w) tensor; same device and dtype."""
    y, x = torch.meshgrid(
        torch.arange(like.shape[-2], device=like.device, dtype=like.dtype),
        torch.arange(like.shape[-1], device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([x, y])[None]


def warp(picture: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Warp `picture` (n, c, h, w) backward along `flow` (n, 2, h, w) in pixels, on the exact grid, borders repeated.

    For measures and losses; the networks were trained with `warp_published`.
    """
    if picture.device.type == "mps":  # its grid_sample supports neither bicubic interpolation nor this padding
        return warp(picture.cpu(), flow.cpu(), mode).to(picture)
    size = torch.tensor([picture.shape[-1], picture.shape[-2]], device=flow.device)[:, None, None]
    grid = 2 * (pixel_grid(flow) + flow + 0.5) / size - 1
    return F.grid_sample(picture, grid.permute(0, 2, 3, 1), mode=mode, padding_mode="border", align_corners=False)


def warp_published(picture: Tensor, flow: Tensor) -> Tensor:
    """Warp `picture` backward along `flow`, on the published code's grid: bilinear, zeros outside.

    The grid is normalised by (size - 1), as for aligned corners, but sampled with `align_corners=False`: even a zero
    flow stretches the picture by half a pixel at its borders. The TCM was trained with this, so it is kept.

    Args:
        picture: (n, c, h, w), the neighbouring frame.
        flow: (n, 2, h, w), x then y, in pixels: for each output pixel, the offset to its position in `picture`.

    Returns:
        (n, c, h, w), the neighbour on the grid of the current frame.
    """
    height, width = picture.shape[-2:]
    # Filled on the device, for a copy would block the host.
    size = torch.cat([flow.new_full((1, 1, 1), max(side - 1, 1)) for side in (width, height)])
    grid = 2.0 * (pixel_grid(flow) + flow) / size - 1.0
    grid = grid.permute(0, 2, 3, 1)
    # In the flow's precision: a bf16 grid would be off by whole pixels.
    warped = F.grid_sample(picture.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.to(picture.dtype)
