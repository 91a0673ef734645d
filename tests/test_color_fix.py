"""The colour fixes: what is right stays, a cast and a lost contrast go, details remain."""

import pytest
import torch
import torch.nn.functional as F

from stablevsr.sampling.color_fix import PROJECTED, coarse, fix_colors
from stablevsr.sampling.config import COLOR_FIXES

KINDS = pytest.mark.parametrize("kind", COLOR_FIXES[1:])
COLORS_ONLY = pytest.mark.parametrize("kind", ["wavelet", "adain"])


def shrunk(picture: torch.Tensor) -> torch.Tensor:
    return F.interpolate(picture, scale_factor=0.25, mode="bicubic", antialias=True, align_corners=False)


def picture(height: int = 96, width: int = 128) -> torch.Tensor:
    """Structure at every scale in [0.2, 0.8]: (2, 3, h, w)."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(2, 3, height, width)
    for size in (2, 5, 17, 64):
        noise = torch.rand(2, 3, size, size, generator=generator)
        total += F.interpolate(noise, size=(height, width), mode="bicubic")
    return ((total - total.mean()) / total.std() * 0.1 + 0.5).clamp(0.2, 0.8)


@KINDS
def test_a_frame_that_fits_its_lr_frame_is_left_alone(kind: str) -> None:
    right = picture()
    rounded = (shrunk(right) * 255).round() / 255  # as a file of 8 bits has it
    assert (fix_colors(right, rounded, kind) - right).abs().max() < 1 / 255


@COLORS_ONLY
@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.1), (0.7, 0.1)])
def test_a_cast_goes_and_details_stay(kind: str, gain: float, offset: float) -> None:
    """Of a cast the mean comes back exactly, of lost contrast what lies in coarse structure."""
    right = picture()
    shift = torch.tensor([offset, -offset, offset / 2])[:, None, None]
    wrong = gain * (right - 0.5) + 0.5 + shift
    fixed = fix_colors(wrong, shrunk(right), kind)
    assert (fixed.mean((2, 3)) - right.mean((2, 3))).abs().max() < 2e-3
    assert (fixed - right).abs().mean() <= 0.5 * (wrong - right).abs().mean()
    fine_of = [x - F.interpolate(shrunk(x), scale_factor=4, mode="bicubic") for x in (fixed, wrong)]
    assert (fine_of[0] - fine_of[1]).abs().max() < 0.02


def test_wavelet_mends_a_cast_that_changes_over_the_picture() -> None:
    right = picture()
    cast = torch.linspace(-0.1, 0.1, 128).expand(96, 128)
    fixed = fix_colors(right + cast, shrunk(right), "wavelet")
    assert (fixed - right).abs()[..., 16:-16].max() < 0.01


def test_backprojection_goes_half_the_way_and_brings_detail_back() -> None:
    right = picture()
    blurred = F.avg_pool2d(F.pad(right, (6,) * 4, mode="replicate"), 13, stride=1)
    fixed = fix_colors(blurred, shrunk(right), "backprojection")
    before, after = ((shrunk(x) - shrunk(right)).abs().mean() for x in (blurred, fixed))
    assert 0.4 * before < after < 0.7 * before
    assert (fixed - right).abs().mean() < 0.9 * (blurred - right).abs().mean()


@KINDS
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_any_size_and_flat_pictures(kind: str, size: tuple[int, int]) -> None:
    low_res = torch.full((1, 3, *size), 0.3)
    wrong = torch.full((1, 3, 4 * size[0], 4 * size[1]), 0.4)
    left = (1 - PROJECTED) * 0.1 if kind == "backprojection" else 0.0
    assert (fix_colors(wrong, low_res, kind) - 0.3 - left).abs().max() < 1e-5
    assert fix_colors(wrong, low_res, None) is wrong


def test_the_coarse_part_of_a_flat_picture_is_the_picture() -> None:
    assert torch.allclose(coarse(torch.full((2, 3, 4, 5), 0.7)), torch.tensor(0.7))
