"""The published networks, built from our configurations, to compare ours with.

`pair` is the way in: it builds the library's module, fills it with noise so that no term hides behind a zero or a one,
and gives our module over the very same tensors. The libraries are imported where they are used, so that what needs
only `randomise` runs without them.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_large, raft_small

from stablevsr.architectures import RAFT_LARGE, RAFT_SMALL
from stablevsr.config import FlowConfig, TCMConfig, TextConfig, UNetConfig, VAEConfig
from stablevsr.config import UNetEncoderConfig as EncoderConfig
from stablevsr.convert import keys
from stablevsr.nn.raft import RAFT
from stablevsr.nn.tcm import TCM
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE


def _encoder_options(config: EncoderConfig) -> dict[str, Any]:
    return {
        "in_channels": config.in_channels,
        "block_out_channels": config.channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if wanted else "DownBlock2D" for wanted in config.attention),
        "only_cross_attention": config.only_cross_attention,
        "attention_head_dim": config.num_heads,
        "transformer_layers_per_block": config.transformer_depth,
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "flip_sin_to_cos": config.cos_first,
        "freq_shift": config.freq_shift,
        "num_class_embeds": config.num_noise_levels,
    }


def diffusers_unet(config: UNetConfig) -> nn.Module:
    """The UNet of diffusers for our configuration."""
    from diffusers import UNet2DConditionModel

    encoder = config.encoder
    return UNet2DConditionModel(
        **_encoder_options(encoder),
        layers_per_block=encoder.blocks_per_level,
        up_block_types=tuple("CrossAttnUpBlock2D" if wanted else "UpBlock2D" for wanted in encoder.attention[::-1]),
        out_channels=config.out_channels,
    )


def diffusers_controlnet(config: TCMConfig) -> nn.Module:
    """The ControlNet of diffusers for our configuration; it knows one number of blocks for all levels only."""
    from diffusers import ControlNetModel

    (blocks,) = set(config.encoder.blocks_per_level)
    return ControlNetModel(
        **_encoder_options(config.encoder),
        layers_per_block=blocks,
        conditioning_channels=config.conditioning_channels,
        conditioning_embedding_out_channels=config.conditioning_widths,
    )


def diffusers_vae(config: VAEConfig) -> nn.Module:
    """The autoencoder of diffusers for our configuration."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    return AutoencoderKL(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.blocks_per_level,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scaling_factor,
    )


def torchvision_raft(config: FlowConfig) -> nn.Module:
    """The RAFT of torchvision: there are two. The number of updates is an argument of its `forward`."""
    build = {RAFT_LARGE: raft_large, RAFT_SMALL: raft_small}[replace(config, num_updates=RAFT_LARGE.num_updates)]
    return build(weights=None)


def transformers_text(config: TextConfig) -> nn.Module:
    """The CLIP text tower of transformers for our configuration."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.num_tokens,
            hidden_act=config.activation,
            layer_norm_eps=config.norm_eps,
        )
    )


REFERENCES: dict[type[nn.Module], tuple[Callable[[Any], nn.Module], keys.Table]] = {
    UNet: (diffusers_unet, keys.DIFFUSERS_UNET),
    TCM: (diffusers_controlnet, keys.DIFFUSERS_TCM),
    VAE: (diffusers_vae, keys.DIFFUSERS_VAE),
    RAFT: (torchvision_raft, keys.TORCHVISION_RAFT),
    TextEncoder: (transformers_text, keys.TRANSFORMERS_TEXT_BARE),
}


def _fill(module: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name == "position_ids":
        tensor.copy_(torch.arange(tensor.shape[-1]))
    elif name == "num_batches_tracked":
        tensor.zero_()
    elif name == "running_var":
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif tensor.dim() <= 1:  # biases, running means, the weights of norms, and single numbers
        tensor.normal_(1.0 if name == "weight" else 0.0, 0.2, generator=generator)
    else:
        spread = 1.0 if isinstance(module, nn.Embedding) else math.sqrt(3 / tensor[0].numel())
        tensor.uniform_(-spread, spread, generator=generator)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and buffer in place, such that activations stay of order one; returns `model`.

    Zero convolutions, the weights and biases of norms, and running statistics too become random.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            _fill(module, name, tensor, generator)
    return model


def build_reference(network: type[nn.Module], config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The library's module for our class `network`, randomised, in eval mode; the library's own init is skipped."""
    build, _ = REFERENCES[network]
    with torch.device("meta"):
        reference = build(config)
    return randomise(reference.to_empty(device="cpu")).to(dtype).eval()


def on_same_weights(network: type[nn.Module], config: Any, reference: nn.Module) -> nn.Module:
    """Our `network` over the tensors of `reference`, found through the key table; every key must have its partner."""
    _, table = REFERENCES[network]
    with torch.device("meta"):
        ours = network(config)
    published = reference.state_dict()
    state = {name: published.pop(theirs) for name, theirs in keys.rename_all(ours.state_dict(), table).items()}
    assert not published, f"our {network.__name__} has no place for {sorted(published)}"
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval()


def pair(network: type[nn.Module], config: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Our `network` and the library's module with the same random weights, which they share in memory."""
    reference = build_reference(network, config, dtype)
    return on_same_weights(network, config, reference), reference


def library_twin(ours: nn.Module, config: Any) -> nn.Module:
    """The library's module with a copy of our module's weights, on the same device and in the same type."""
    build, table = REFERENCES[type(ours)]
    with torch.device("meta"):
        theirs = build(config)
    state = ours.state_dict()
    names = keys.rename_all(state, table)
    copies = {names[name]: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    theirs.load_state_dict(copies, assign=True)
    return theirs.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||; shapes must agree."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    return ((ours - theirs).norm() / theirs.norm()).item()
