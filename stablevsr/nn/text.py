"""The CLIP text tower (Radford et al. 2021) that turns a tokenised prompt into the UNet's context."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stablevsr.config import TextConfig


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Causal self-attention and a two-layer perceptron, each with a layer norm before it and a skip around."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.activation = _quick_gelu if config.activation == "quick_gelu" else F.gelu
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(config.width, config.width)
        self.to_v = nn.Linear(config.width, config.width)
        self.to_out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            rearrange(t, "n l (heads d) -> n heads l d", heads=self.num_heads)
            for t in (self.to_q(y), self.to_k(y), self.to_v(y))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(rearrange(y, "n heads l d -> n l (heads d)"))
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm2(x))))


class TextEncoder(nn.Module):
    """Tokens to the last hidden state after the final norm. Padding is attended to, as in the SD x4 pipeline."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.num_tokens, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, num_tokens) token ids to (n, num_tokens, width)."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)
