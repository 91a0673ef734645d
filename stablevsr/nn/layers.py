"""Building blocks shared by the UNet, the TCM and the VAE."""

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN reorders the weights in every call of a convolution. Above this size the copy is fresh memory, which the system
# clears page by page (glibc keeps no block of over 32 MiB): at few positions that takes longer than the convolution.
WIDE_BYTES, FEW_POSITIONS = 2**25, 320


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep (Ho et al. 2020), then two linear layers.

    Args:
        num_frequencies_dim: width of the sinusoids, even.
        time_dim: width of the result.
        cos_first: cosines before sines.
        freq_shift: subtracted from the number of frequencies in the exponent.
    """

    def __init__(self, num_frequencies_dim: int, time_dim: int, cos_first: bool, freq_shift: float) -> None:
        super().__init__()
        self.half_dim = num_frequencies_dim // 2
        self.cos_first = cos_first
        self.freq_shift = freq_shift
        self.linear_1 = nn.Linear(num_frequencies_dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """(n,) timesteps to (n, time_dim)."""
        # Always in float32: bf16 cannot tell neighbouring timesteps apart.
        order = torch.arange(self.half_dim, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(10_000) * order / (self.half_dim - self.freq_shift))
        angles = timestep[:, None].float() * frequencies[None]
        waves = [angles.cos(), angles.sin()] if self.cos_first else [angles.sin(), angles.cos()]
        x = torch.cat(waves, dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, a skip, and optionally the time embedding in between."""

    def __init__(
        self, in_channels: int, out_channels: int, norm_groups: int, norm_eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(n, in, h, w), (n, time_dim) to (n, out, h, w)."""
        # In place wherever nothing else uses the tensor: large ones take time to allocate on a CPU.
        y = convolve(self.conv1, F.silu(self.norm1(x), inplace=True))
        if self.time_proj is not None:
            assert time is not None, "a block with time_dim takes the time embedding"
            y += self.time_proj(F.silu(time))[:, :, None, None]
        y = convolve(self.conv2, F.silu(self.norm2(y), inplace=True))
        y += self.skip(x)
        return y


def _is_faster_as_product(weight: Tensor, x: Tensor) -> bool:
    """Whether a convolution of x is faster as one matrix product: a wide one at few positions, on a CPU."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or weight.device.type != "cpu":
        return False
    fits = weight.dtype == torch.float32 and weight.is_contiguous()
    return fits and 4 * weight.numel() > WIDE_BYTES and x.shape[-2:].numel() <= FEW_POSITIONS


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)` of a 3x3 convolution with padding 1 and a bias; wide ones on a CPU as a matrix product.

    2048 to 1024 channels at 4x4 positions on one core: 13 ms instead of 59.
    """
    if not _is_faster_as_product(conv.weight, x):
        return conv(x)
    assert conv.bias is not None
    products = conv.weight.flatten(1) @ F.unfold(x, 3, padding=1)  # (n, out, h w)
    return (products + conv.bias[:, None]).unflatten(2, x.shape[-2:])


def double_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Nearest-neighbour upsampling by two and a 3x3 convolution, fused: (n, c, h, w) to (n, out, 2h, 2w).

    Every output depends on only 2x2 distinct inputs, so a 4x4 transposed convolution computes the same up to rounding,
    with 16 multiplications per input instead of 36.
    """
    kernel = _doubled_kernel(conv)
    if not _is_faster_as_product(kernel, x):
        return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)
    size = (2 * x.shape[-2], 2 * x.shape[-1])
    doubled = F.fold(kernel.flatten(1).T @ x.flatten(2), size, 4, stride=2, padding=1)
    return doubled if conv.bias is None else doubled + conv.bias[:, None, None]


def _doubled_kernel(conv: nn.Conv2d) -> Tensor:
    """The 4x4 kernel. Kept for the next call on a CPU, where summing it takes longer than convolving a small frame."""
    weight = conv.weight
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or weight.is_inference() or torch.is_grad_enabled():
        return _double(weight)
    known = _kernels.get(conv)
    if known is not None and known.weight.data_ptr() == weight.data_ptr() and known.version == weight._version:
        return known.kernel
    kernel = _double(weight)
    if weight.is_contiguous():  # not channels_last: then its order is the one that convolutions want
        kernel = kernel.contiguous()
    _kernels[conv] = _Doubled(weight.detach(), weight._version, kernel)
    return kernel


class _Doubled(NamedTuple):
    """A kernel, and the state of the weights that it was made of."""

    weight: Tensor  # held, so that no other weights can be at the same place in memory
    version: int
    kernel: Tensor


_kernels: WeakKeyDictionary[nn.Conv2d, _Doubled] = WeakKeyDictionary()


def _double(weight: Tensor) -> Tensor:
    # The sum of the kernel at each of the four positions of an upsampled pixel. In float32: half precision would round
    # the sums, which the two separate steps never form.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    kernels = [F.pad(wide, (right, 1 - right, down, 1 - down)) for down in (0, 1) for right in (0, 1)]
    return sum(kernels[1:], kernels[0]).to(weight.dtype).transpose(0, 1).flip(-1, -2)


class Upsample(nn.Module):
    """Nearest-neighbour resizing to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(n, c, h, w) to (n, c, *size)."""
        if size == (2 * x.shape[-2], 2 * x.shape[-1]):
            return double_and_convolve(x, self.conv)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
