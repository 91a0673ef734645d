"""Attention: the UNet's transformers over picture and text, and the VAE's single-head spatial attention."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# As upstream, the transformers' input norm and the VAE use this epsilon, whatever the UNet's config says.
NORM_EPS = 1e-6
HALF = (torch.float16, torch.bfloat16)
MAX_FLASH_HEAD = 256  # width up to which there are flash kernels
CHUNK = 2048  # queries at a time; their scores take less memory than the decoder's largest level
MAX_MPS_SCORES = 2**28  # elements: MPS materialises all scores, and aborts when they are too many


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all (n, heads, tokens, d), by the method that suits the device."""
    too_wide = q.is_cuda and q.dtype in HALF and q.shape[-1] > MAX_FLASH_HEAD and torch.version.hip is None
    too_many = q.device.type == "mps" and q.shape[:3].numel() * k.shape[2] > MAX_MPS_SCORES
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if (too_wide or too_many) and not needs_grad:
        return attend_in_chunks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, rows: int = CHUNK) -> Tensor:
    """`attend` as two matrix products for `rows` queries at a time, with scores and softmax in float32.

    It has no gradient in half precision on CUDA, where PyTorch has none for the first product.
    """

    def scores(queries: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in HALF:
            return torch.bmm(queries, keys.mT, out_dtype=torch.float32)
        return queries.float() @ keys.float().mT

    keys, values, scale = k.flatten(0, 1), v.flatten(0, 1), q.shape[-1] ** -0.5
    parts = [
        scores(queries).mul_(scale).softmax(-1).to(v.dtype) @ values for queries in q.flatten(0, 1).split(rows, dim=1)
    ]
    return torch.cat(parts, dim=1).view_as(q)


class Attention(nn.Module):
    """Multi-head attention. Queries come from `x`, keys and values from `context`."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: "Context") -> Tensor:
        """(n, tokens, dim), (n, context tokens, context_dim) to (n, tokens, dim)."""
        if isinstance(context, CachedContext):
            k, v = context.keys_and_values(self)
        else:
            k, v = self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(t, "n l (heads d) -> n heads l d", heads=self.num_heads) for t in (self.to_q(x), k, v))
        y = attend(q, k, v)
        return self.to_out(rearrange(y, "n heads l d -> n l (heads d)"))


class CachedContext:
    """A text context that caches its keys and values in every attention layer, for runs with a constant prompt.

    The caller owns it, and drops it when weights or text change. Not for compiled networks.
    """

    def __init__(self, context: Tensor) -> None:
        self._context = context  # (n, tokens, context_dim)
        self._cache: dict[Attention, tuple[Tensor, Tensor]] = {}

    def keys_and_values(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """(n, tokens, dim) each; computed on first use."""
        if attention not in self._cache:
            self._cache[attention] = attention.to_k(self._context), attention.to_v(self._context)
        return self._cache[attention]


Context = Tensor | CachedContext


class FeedForward(nn.Module):
    """Feed-forward with a gated GELU (Shazeer 2020), four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)  # value and gate, stacked
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each with a layer norm before it and a skip around.

    With `only_cross_attention` the first attention attends to the text as well, as in those levels of the SD x4
    upscaler that are too large for self-attention.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, context_dim if only_cross_attention else dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, context if self.only_cross_attention else y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a skip around all of them."""

    def __init__(
        self,
        channels: int,
        context_dim: int,
        num_heads: int,
        depth: int,
        norm_groups: int,
        linear_projection: bool,
        only_cross_attention: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, num_heads, only_cross_attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(n, c, h, w), (n, tokens, context_dim) to (n, c, h, w)."""
        height = x.shape[-2]
        y = self.norm(x)
        if not self.linear_projection:
            y = self.proj_in(y)
        y = rearrange(y, "n c h w -> n (h w) c")
        if self.linear_projection:
            y = self.proj_in(y)
        for block in self.blocks:
            y = block(y, context)
        if self.linear_projection:
            y = self.proj_out(y)
        y = rearrange(y, "n (h w) c -> n c h w", h=height)
        if not self.linear_projection:
            y = self.proj_out(y)
        return x + y


class SpatialAttention(nn.Module):
    """The VAE's attention over all positions, with one head as wide as the feature map."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.attention = Attention(channels, channels, num_heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, h, w)."""
        y = rearrange(self.norm(x), "n c h w -> n (h w) c")
        y = self.attention(y, y)
        return x + rearrange(y, "n (h w) c -> n c h w", h=x.shape[-2])
