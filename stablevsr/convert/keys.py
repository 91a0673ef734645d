"""Key tables: from our parameter names to the published ones.

A table is a list of (pattern, replacement) pairs, applied in order to our name; the result is the published name.
Renaming has only this direction: reading starts from the names that the model expects, so that no unknown or missing
key goes unnoticed.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stablevsr.config import FlowConfig, TemporalTinyConfig, TinyDecoderConfig
from stablevsr.errors import WeightsError

Table = list[tuple[str, str]]


def rename(name: str, table: Table) -> str:
    """The published name of our parameter `name`."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def rename_all(names: Iterable[str], table: Table) -> dict[str, str]:
    """From our name to the published name, for all of `names`; no two may share one."""
    renamed = {name: rename(name, table) for name in names}
    assert len(set(renamed.values())) == len(renamed), "a key table maps two parameters to one name"
    return renamed


# Inside our transformers, as named upstream.
_TRANSFORMER: Table = [
    (r"(\.transformer(?:s\.\d+)?)\.blocks\.", r"\1.transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.feed_forward\.proj_in\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.proj_out\.", ".ff.net.2."),
]

_RES_BLOCK: Table = [
    (r"\.time_proj\.", ".time_emb_proj."),
    (r"(resnets\.\d+)\.skip\.", r"\1.conv_shortcut."),
]

# UNetEncoder, as part of UNet and TCM, in the diffusers layout.
_DIFFUSERS_ENCODER: Table = [
    *_TRANSFORMER,
    (r"^encoder\.noise_level_embedding\.", "class_embedding."),
    (r"^encoder\.levels\.(\d+)\.blocks\.", r"down_blocks.\1.resnets."),
    (r"^encoder\.levels\.(\d+)\.transformers\.", r"down_blocks.\1.attentions."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"^encoder\.middle\.block_1\.", "mid_block.resnets.0."),
    (r"^encoder\.middle\.block_2\.", "mid_block.resnets.1."),
    (r"^encoder\.middle\.transformer\.", "mid_block.attentions.0."),
    (r"^encoder\.", ""),
]

DIFFUSERS_UNET: Table = [
    *_DIFFUSERS_ENCODER,
    (r"^decoder\.levels\.(\d+)\.blocks\.", r"up_blocks.\1.resnets."),
    (r"^decoder\.levels\.(\d+)\.transformers\.", r"up_blocks.\1.attentions."),
    (r"^decoder\.levels\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"^decoder\.norm_out\.", "conv_norm_out."),
    (r"^decoder\.conv_out\.", "conv_out."),
    *_RES_BLOCK,
]

DIFFUSERS_TCM: Table = [
    *_DIFFUSERS_ENCODER,
    (r"^conditioning\.convs\.", "controlnet_cond_embedding.blocks."),
    (r"^conditioning\.", "controlnet_cond_embedding."),
    (r"^zero_convs\.", "controlnet_down_blocks."),
    (r"^zero_conv_middle\.", "controlnet_mid_block."),
    *_RES_BLOCK,
]

DIFFUSERS_VAE: Table = [
    (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.levels\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.middle\.block_1\.", ".mid_block.resnets.0."),
    (r"\.middle\.block_2\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.attention\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.to_out\.", ".to_out.0."),
    *_RES_BLOCK,
]

# The VAE's attention in files written before diffusers 0.15.
DIFFUSERS_VAE_OLD: Table = [
    *DIFFUSERS_VAE,
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
]

# transformers' CLIPTextModel; transformers 5 omits the prefix that all published files have.
TRANSFORMERS_TEXT_BARE: Table = [
    (r"^(token_embedding|position_embedding)\.", r"embeddings.\1."),
    (r"^norm_out\.", "final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.to_(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.to_out\.", ".self_attn.out_proj."),
    (r"\.mlp_in\.", ".mlp.fc1."),
    (r"\.mlp_out\.", ".mlp.fc2."),
]
TRANSFORMERS_TEXT: Table = [*TRANSFORMERS_TEXT_BARE, (r"^", "text_model.")]

# torchvision's RAFT. The encoders' six blocks are three layers of two.
TORCHVISION_RAFT: Table = [
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    *((rf"_encoder\.blocks\.{i}\.", rf"_encoder.layer{i // 2 + 1}.{i % 2}.") for i in range(6)),
    *((rf"\.convs\.{i}\.", f".convnormrelu{i + 1}.") for i in range(3)),
    (r"\.stem\.", ".convnormrelu."),
    (r"\.skip\.", ".downsample."),
    (r"_encoder\.(.*)\.conv\.", r"_encoder.\1.0."),
    (r"_encoder\.(.*)\.norm\.", r"_encoder.\1.1."),
    (r"_encoder\.conv_out\.", "_encoder.conv."),
    *((rf"^motion_encoder\.corr_convs\.{i}\.", f"update_block.motion_encoder.convcorr{i + 1}.0.") for i in range(2)),
    *((rf"^motion_encoder\.flow_convs\.{i}\.", f"update_block.motion_encoder.convflow{i + 1}.0.") for i in range(2)),
    (r"^motion_encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    *((rf"^grus\.{i}\.conv_", f"update_block.recurrent_block.convgru{i + 1}.conv") for i in range(2)),
    (r"^flow_head\.0\.", "update_block.flow_head.conv1."),
    (r"^flow_head\.2\.", "update_block.flow_head.conv2."),
    (r"^mask_head\.0\.", "mask_predictor.convrelu.0."),
    (r"^mask_head\.2\.", "mask_predictor.conv."),
]


def diffusers_tiny(config: TinyDecoderConfig) -> Table:
    """The decoder of diffusers' AutoencoderTiny."""
    return _tiny_layers(config.num_blocks, "", "decoder.layers.")


def diffusers_temporal_tiny(config: TemporalTinyConfig) -> Table:
    """Stream-DiffVSR's TemporalAutoencoderTiny: AutoencoderTiny's names, plus a TPM in every block."""
    return [
        *_tiny_layers(config.num_blocks[::-1], r"encoder\.", "encoder.layers."),
        *_tiny_layers(config.num_blocks, r"decoder\.", "decoder.layers."),
        (r"\.temporal\.alpha$", ".alpha"),
        *((rf"\.temporal\.convs\.{i}\.", f".temporal_processor.{2 * i}.") for i in range(2)),
    ]


def _tiny_layers(num_blocks: tuple[int, ...], ours: str, theirs: str) -> Table:
    """Encoder or decoder of an AutoencoderTiny. Its numbering of layers includes those without weights.

    Args:
        ours, theirs: prefixes of a layer's name; `ours` is a pattern.
    """
    decodes = theirs.startswith("decoder")
    # A decoder has a ReLU after its first convolution, and an upsampling layer before each convolution between levels.
    table, place = [(rf"^{ours}conv_in\.", f"{theirs}0.")], 2 if decodes else 1
    for level, count in enumerate(num_blocks):
        for block in range(count):
            layer = f"{theirs}{place + block}."
            before = rf"^{ours}levels\.{level}\.{block}\."
            table += [(rf"{before}convs\.{i}\.", f"{layer}conv.{2 * i}.") for i in range(3)]
            table.append((rf"{before}temporal\.", f"{layer}temporal."))
        place += count
        if level < len(num_blocks) - 1:
            between = rf"^{ours}{'upsamples' if decodes else 'downsamples'}\.{level}\."
            table.append((between, f"{theirs}{place + decodes}."))
            place += 1 + decodes
    return [*table, (rf"^{ours}conv_out\.", f"{theirs}{place}.")]


def princeton_raft(config: FlowConfig) -> Table:
    """princeton-vl's RAFT, after `merge_princeton_names`."""
    # The two separable GRUs of the large model are numbered, the single one of the small model is not.
    gru_numbers = [""] if len(config.gru_kernels) == 1 else [str(i + 1) for i in range(len(config.gru_kernels))]
    return [
        *((rf"^([fc]net)\.blocks\.{i}\.", rf"\1.layer{i // 2 + 1}.{i % 2}.") for i in range(6)),
        *((rf"\.convs\.{i}\.(conv|norm)\.", rf".\g<1>{i + 1}.") for i in range(3)),
        (r"\.stem\.(conv|norm)\.", r".\g<1>1."),
        (r"\.skip\.conv\.", ".downsample.0."),
        (r"\.skip\.norm\.", ".downsample.1."),
        (r"^([fc]net)\.conv_out\.", r"\1.conv2."),
        *((rf"^motion_encoder\.corr_convs\.{i}\.", f"update_block.encoder.convc{i + 1}.") for i in range(2)),
        *((rf"^motion_encoder\.flow_convs\.{i}\.", f"update_block.encoder.convf{i + 1}.") for i in range(2)),
        (r"^motion_encoder\.conv_out\.", "update_block.encoder.conv."),
        *((rf"^grus\.{i}\.conv_(.)\.", rf"update_block.gru.conv\g<1>{n}.") for i, n in enumerate(gru_numbers)),
        (r"^flow_head\.0\.", "update_block.flow_head.conv1."),
        (r"^flow_head\.2\.", "update_block.flow_head.conv2."),
        (r"^mask_head\.", "update_block.mask."),
    ]


def merge_princeton_names(tensors: Mapping[str, Tensor], config: FlowConfig, path: str) -> dict[str, Tensor]:
    """The tensors of the princeton-vl/RAFT file `path`, without duplicates.

    The published files have DataParallel's prefix "module.", and the norm of a shortcut twice: as the last norm of its
    block and as "downsample.1", which is kept.

    Raises:
        WeightsError: when the two differ.
    """
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    last_norm = "norm3" if config.block == "residual" else "norm4"
    merged: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix).replace(f".{last_norm}.", ".downsample.1.")
        if name in merged and not torch.equal(merged[name], tensor):
            raise WeightsError(f"{path}: {full_name} differs from its duplicate {name}; the file is damaged")
        merged[name] = tensor
    return merged
