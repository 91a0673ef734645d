"""The original single-file SD x4 upscaler (`x4-upscaler-ema`), in the layout of Stability-AI/stablediffusion.

The key tables depend on the configuration, because this layout numbers the UNet's blocks consecutively:
`input_blocks.7.1` is the transformer of block 0 in level 2 when a level has two blocks.

The published names use one notation of ours: `in_proj_weight[1]` is the second of three equal parts of the tensor
`in_proj_weight`, in which OpenCLIP stacks queries, keys and values.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from stablevsr.config import ModelConfig, ScheduleConfig, TextConfig, UNetEncoderConfig, VAEConfig
from stablevsr.convert.keys import Table, rename_all
from stablevsr.errors import WeightsError
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE
from stablevsr.sampling.schedule import betas

LOW_SCALE = "low_scale_model."  # the buffers of the schedule that noises the low-resolution frame

# The VAE's attention has 1x1 convolutions there, and linear layers here.
_CONV_FOR_LINEAR = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")
_FUSED_PART = re.compile(r"\[(\d)\]$")

# What such a file contains beyond our networks, as full matches.
_UNNEEDED = (
    # buffers derived from the betas, which are compared with the configuration
    rf"({re.escape(LOW_SCALE)})?(betas|(sqrt_)?alphas_cumprod|alphas_cumprod_prev|(sqrt|log)_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod)",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])",
    r"lvlb_weights|logvar",  # weights of the training loss
    r"model_ema\.(decay|num_updates)",  # counters; the weights are averaged already
    r"first_stage_model\.loss\..+",  # the autoencoder's discriminator
    r"cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)",  # CLIP's contrastive head; a mask
)


def ldm_unet(config: UNetEncoderConfig) -> Table:
    """From our names of the UNet's parameters to the file's."""
    res_block = r"((?:(?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.)"
    return [
        (r"^encoder\.time_embedding\.linear_1\.", "time_embed.0."),
        (r"^encoder\.time_embedding\.linear_2\.", "time_embed.2."),
        (r"^encoder\.noise_level_embedding\.", "label_emb."),
        (r"^encoder\.conv_in\.", "input_blocks.0.0."),
        *_input_blocks(config),
        (r"^encoder\.middle\.block_1\.", "middle_block.0."),
        (r"^encoder\.middle\.transformer\.", "middle_block.1."),
        (r"^encoder\.middle\.block_2\.", "middle_block.2."),
        *_output_blocks(config),
        (r"^decoder\.norm_out\.", "out.0."),
        (r"^decoder\.conv_out\.", "out.2."),
        (res_block + r"norm1\.", r"\1in_layers.0."),
        (res_block + r"conv1\.", r"\1in_layers.2."),
        (res_block + r"time_proj\.", r"\1emb_layers.1."),
        (res_block + r"norm2\.", r"\1out_layers.0."),
        (res_block + r"conv2\.", r"\1out_layers.3."),
        (res_block + r"skip\.", r"\1skip_connection."),
        (r"\.1\.blocks\.", ".1.transformer_blocks."),
        (r"\.to_out\.", ".to_out.0."),
        (r"\.feed_forward\.proj_in\.", ".ff.net.0.proj."),
        (r"\.feed_forward\.proj_out\.", ".ff.net.2."),
        (r"^", "model.diffusion_model."),
    ]


def _input_blocks(config: UNetEncoderConfig) -> Iterator[tuple[str, str]]:
    """Block 0 is the first convolution; residual blocks and stride-2 convolutions are numbered from 1."""
    number = 1
    for level, count in enumerate(config.blocks_per_level):
        ours = rf"^encoder\.levels\.{level}\."
        for i in range(count):
            yield rf"{ours}blocks\.{i}\.", f"input_blocks.{number}.0."
            yield rf"{ours}transformers\.{i}\.", f"input_blocks.{number}.1."
            number += 1
        yield rf"{ours}downsample\.", f"input_blocks.{number}.0.op."
        number += 1


def _output_blocks(config: UNetEncoderConfig) -> Iterator[tuple[str, str]]:
    """Coarsest level first; the upsampling is the last member of a level's last block."""
    number = 0
    for ours_level, level in enumerate(reversed(range(len(config.channels)))):
        ours = rf"^decoder\.levels\.{ours_level}\."
        for i in range(config.blocks_per_level[level] + 1):
            yield rf"{ours}blocks\.{i}\.", f"output_blocks.{number}.0."
            yield rf"{ours}transformers\.{i}\.", f"output_blocks.{number}.1."
            number += 1
        yield rf"{ours}upsample\.", f"output_blocks.{number - 1}.{2 if config.attention[level] else 1}."


def ldm_vae(config: VAEConfig) -> Table:
    """From our names of the VAE's parameters to the file's, whose decoder numbers its levels from the finest."""
    last = len(config.channels) - 1
    return [
        (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
        (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample."),
        *((rf"^decoder\.levels\.{i}\.blocks\.", f"decoder.up.{last - i}.block.") for i in range(last + 1)),
        *((rf"^decoder\.levels\.{i}\.resample\.", f"decoder.up.{last - i}.upsample.") for i in range(last + 1)),
        (r"\.middle\.attention\.attention\.to_([qkv])\.", r".mid.attn_1.\1."),
        (r"\.middle\.attention\.attention\.to_out\.", ".mid.attn_1.proj_out."),
        (r"\.middle\.attention\.norm\.", ".mid.attn_1.norm."),
        (r"\.middle\.", ".mid."),
        (r"\.skip\.", ".nin_shortcut."),
        (r"^", "first_stage_model."),
    ]


OPEN_CLIP_TEXT: Table = [
    (r"^position_embedding\.weight$", "positional_embedding"),
    (r"^norm_out\.", "ln_final."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    *((rf"\.to_{name}\.(weight|bias)$", rf".attn.in_proj_\1[{part}]") for part, name in enumerate("qkv")),
    (r"\.to_out\.", ".attn.out_proj."),
    (r"\.mlp_in\.", ".mlp.c_fc."),
    (r"\.mlp_out\.", ".mlp.c_proj."),
    (r"^", "cond_stage_model.model."),
]


def convert_ldm(
    tensors: Mapping[str, Tensor], config: ModelConfig, path: str
) -> tuple[dict[str, dict[str, Tensor]], ModelConfig]:
    """The networks of an original SD x4 upscaler file, under our names.

    Args:
        tensors: the file's state dict (of a `.ckpt`, what is under "state_dict").
        config: of the expected model. Without `config.text`, the file's text tower is ignored.
        path: the file, for messages.

    Returns:
        {"unet": ..., "vae": ..., "text": ...}, our parameter names to tensors, which are views of the file's; and
        `config` with the low-resolution schedule found in the file's buffers.

    Raises:
        WeightsError: for a missing, misshapen or unknown tensor, and for a noise schedule that differs from `config`.
    """
    used: set[str] = set()
    parts = {}
    for part, (shapes, table) in _expected(config).items():
        names = rename_all(shapes, table)
        parts[part] = {ours: _take(tensors, names[ours], shape, path) for ours, shape in shapes.items()}
        used |= {_FUSED_PART.sub("", name) for name in names.values()}
    _refuse_unknown(set(tensors) - used, config.text, path)
    return parts, _check_schedules(tensors, config, path)


def _expected(config: ModelConfig) -> dict[str, tuple[dict[str, torch.Size], Table]]:
    """For each part: the shapes of our parameters, and the table to the file's names."""
    assert isinstance(config.vae, VAEConfig), "this layout has no tiny autoencoder"
    with torch.device("meta"):
        models: dict[str, tuple[nn.Module, Table]] = {
            "unet": (UNet(config.unet), ldm_unet(config.unet.encoder)),
            "vae": (VAE(config.vae), ldm_vae(config.vae)),
        }
        if config.text is not None:
            models["text"] = (TextEncoder(config.text), OPEN_CLIP_TEXT)
    return {
        part: ({name: tensor.shape for name, tensor in model.state_dict().items()}, table)
        for part, (model, table) in models.items()
    }


def _take(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, path: str) -> Tensor:
    """The file's tensor that `name` denotes, as a view of `shape`."""
    fused = _FUSED_PART.search(name)
    key = _FUSED_PART.sub("", name)
    as_conv = _CONV_FOR_LINEAR.search(key) is not None
    expected = (3 * shape[0], *shape[1:]) if fused else (*shape, 1, 1) if as_conv else tuple(shape)
    if key not in tensors:
        raise WeightsError(
            f"{path}: {key} is missing, expected a tensor of shape {expected} (SD x4 upscaler, LDM layout)"
        )
    tensor = tensors[key]
    if tuple(tensor.shape) != expected:
        raise WeightsError(f"{path}: {key} has shape {tuple(tensor.shape)}, expected {expected}")
    if fused:
        return tensor.chunk(3)[int(fused[1])]
    return tensor[..., 0, 0] if as_conv else tensor


def _refuse_unknown(names: set[str], text: TextConfig | None, path: str) -> None:
    # The UNet was trained on the output of the last layer but one; the file still has the last.
    text_tower = r".+" if text is None else rf"transformer\.resblocks\.{text.num_layers}\..+"
    known = re.compile("|".join((*_UNNEEDED, rf"cond_stage_model\.model\.{text_tower}")))
    unknown = sorted(name for name in names if not known.fullmatch(name))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise WeightsError(
            f"{path}: {unknown[0]}{more} is not part of the expected model (SD x4 upscaler, LDM layout); "
            f"the file may hold another model or size"
        )


def _check_schedules(tensors: Mapping[str, Tensor], config: ModelConfig, path: str) -> ModelConfig:
    """`config` with the low-resolution schedule of the file; absent buffers are not checked."""
    if "betas" in tensors:
        _match("betas", tensors, [config.schedule], path)
    name = LOW_SCALE + "betas"
    if name not in tensors or config.low_res_schedule is None:
        return config
    # Public files differ: the default of this layout is scaled_linear, the diffusers folder has a cosine schedule.
    candidates = [
        dataclasses.replace(config.low_res_schedule, beta_schedule=schedule)
        for schedule in ("scaled_linear", "squaredcos_cap_v2")
    ]
    return dataclasses.replace(config, low_res_schedule=_match(name, tensors, candidates, path))


def _match(name: str, tensors: Mapping[str, Tensor], candidates: list[ScheduleConfig], path: str) -> ScheduleConfig:
    """The candidate whose betas match the buffer `name`."""
    found = tensors[name]
    tolerance = max(1e-6, torch.finfo(found.dtype).eps) if found.is_floating_point() else 0.0
    for candidate in candidates:
        expected = betas(candidate)
        if found.shape == expected.shape and torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=0):
            return candidate
    wanted = " or ".join(
        f"{len(betas(each))} of {each.beta_schedule}, {betas(each)[0]:.4g} to {betas(each)[-1]:.4g}"
        for each in candidates
    )
    ends = f", {found.flatten()[0]:.4g} to {found.flatten()[-1]:.4g}" if found.numel() else ""
    raise WeightsError(f"{path}: the noise schedule {name} has {found.numel()} entries{ends}; expected {wanted}")
