"""The published config files (diffusers, transformers) to our dataclasses and back.

Every key of a published config is one of: read here, fixed to the values that our networks implement, or known to make
no difference. Anything else is refused by name, so that a checkpoint never loads as something it is not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from stablevsr.config import (
    ScheduleConfig,
    TCMConfig,
    TextConfig,
    TinyDecoderConfig,
    UNetConfig,
    UNetEncoderConfig,
    VAEConfig,
)
from stablevsr.errors import UserError

Json = dict[str, Any]
Fixed = dict[str, tuple[Any, ...]]

_ENCODER_FIXED: Fixed = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_time_scale_shift": ("default",),
}
# upcast_attention: our attention always has a float32 softmax. The others only matter with the types fixed above.
_ENCODER_IGNORED = ("addition_embed_type_num_heads", "upcast_attention")
_ENCODER_READ = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "only_cross_attention",
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
    "num_class_embeds",
)

_UNET_FIXED: Fixed = {
    **_ENCODER_FIXED,
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# mid_block_only_cross_attention: upstream reads it for another type of middle block only.
_UNET_IGNORED = (*_ENCODER_IGNORED, "sample_size", "mid_block_only_cross_attention")

_TCM_FIXED: Fixed = {
    **_ENCODER_FIXED,
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}

_VAE_FIXED: Fixed = {
    "act_fn": ("silu", "swish"),
    "in_channels": (3,),
    "out_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_VAE_IGNORED = ("force_upcast", "sample_size")

_TINY_FIXED: Fixed = {
    "act_fn": ("relu",),
    "latent_magnitude": (3,),
    "out_channels": (3,),
    "scaling_factor": (1.0,),  # it decodes scaled latents
    "shift_factor": (0.0,),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
_TINY_IGNORED = (
    "block_out_channels",
    "encoder_block_out_channels",
    "force_upcast",
    "in_channels",
    "latent_shift",
    "num_encoder_blocks",
    "sample_size",
)

_SCHEDULE_FIXED: Fixed = {
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "trained_betas": (None,),
    "variance_type": ("fixed_small",),
}
_SCHEDULE_IGNORED = ("dynamic_thresholding_ratio", "sample_max_value")  # only for thresholding
_SCHEDULE_READ = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "timestep_spacing",
    "steps_offset",
)


def _names_source(read: Callable[[Json, str], Any]) -> Callable[[Json, str], Any]:
    """What refuses a value may not know the file, or may not have expected the value's type: say both."""

    @functools.wraps(read)
    def reader(config: Json, source: str) -> Any:
        try:
            return read(config, source)
        except UserError as error:
            message = str(error)
            raise UserError(message if message.startswith(source) else f"{source}: {message}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{source} holds a value of the wrong type ({error}): download it again") from error

    return reader


def _check_class(config: Json, source: str, expected: str) -> None:
    found = config.get("_class_name", expected)
    if found != expected:
        raise UserError(f"{source} describes a {found}, expected a {expected}")


def _check_keys(config: Json, source: str, read: Sequence[str], fixed: Fixed, ignored: Sequence[str]) -> None:
    for key, value in config.items():
        if key in fixed:
            if value not in fixed[key]:
                choices = " or ".join(map(repr, fixed[key]))
                raise UserError(f"{source}: {key} = {value!r} is not supported, only {choices} is")
        elif not (key.startswith("_") or key in read or key in ignored):
            raise UserError(f"{source}: {key} = {value!r} is not a known setting, so it cannot be honoured")


def _per_level(value: Any, levels: int, key: str, source: str) -> tuple[Any, ...]:
    """Upstream writes one value for all levels, or a list with one for each."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or any(isinstance(entry, list | tuple | type(None)) for entry in values):
        raise UserError(f"{source}: {key} = {value!r} is not supported, expected one value or {levels}")
    return values


def _read_encoder(config: Json, source: str) -> UNetEncoderConfig:
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(channels)

    def per_level(key: str, default: Any) -> tuple[Any, ...]:
        return _per_level(config.get(key, default), levels, key, source)

    attention = []
    for kind in per_level("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]):
        if kind not in ("DownBlock2D", "CrossAttnDownBlock2D"):
            raise UserError(f"{source}: a block of type {kind} is not supported, only (CrossAttn)DownBlock2D is")
        attention.append(kind == "CrossAttnDownBlock2D")
    # A historic misnomer: "attention_head_dim" is the number of heads, unless "num_attention_heads" says so itself.
    heads_key = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    return UNetEncoderConfig(
        in_channels=config.get("in_channels", 4),
        channels=channels,
        blocks_per_level=per_level("layers_per_block", 2),
        attention=tuple(attention),
        only_cross_attention=per_level("only_cross_attention", False),
        num_heads=per_level(heads_key, 8),
        transformer_depth=per_level("transformer_layers_per_block", 1),
        context_dim=_one_width(config.get("cross_attention_dim", 1280), source),
        linear_projection=config.get("use_linear_projection", False),
        norm_groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
        cos_first=config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        num_noise_levels=config.get("num_class_embeds"),
    )


def _one_width(value: Any, source: str) -> int:
    widths = set(value) if isinstance(value, list | tuple) else {value}
    if len(widths) != 1:
        raise UserError(f"{source}: cross_attention_dim = {value!r} is not supported, expected one width")
    return widths.pop()


@_names_source
def read_unet(config: Json, source: str) -> UNetConfig:
    """`config` of a UNet2DConditionModel; `source` names the file in errors, which are `UserError`."""
    _check_class(config, source, "UNet2DConditionModel")
    read = (*_ENCODER_READ, "out_channels", "up_block_types")
    _check_keys(config, source, read, _UNET_FIXED, _UNET_IGNORED)
    encoder = _read_encoder(config, source)
    mirrored = _up_block_types(encoder)
    found = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(encoder.channels) - 1))
    if list(found) != mirrored:
        raise UserError(f"{source}: up_block_types = {found!r} is not supported, expected the mirror {mirrored}")
    return UNetConfig(encoder, config.get("out_channels", 4))


@_names_source
def read_tcm(config: Json, source: str) -> TCMConfig:
    """`config` of a ControlNetModel."""
    _check_class(config, source, "ControlNetModel")
    read = (*_ENCODER_READ, "conditioning_channels", "conditioning_embedding_out_channels")
    _check_keys(config, source, read, _TCM_FIXED, _ENCODER_IGNORED)
    widths = tuple(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))
    return TCMConfig(_read_encoder(config, source), config.get("conditioning_channels", 3), widths)


@_names_source
def read_vae(config: Json, source: str) -> VAEConfig:
    """`config` of an AutoencoderKL. Without a scaling factor it is the SD x4 upscaler's, as in its pipeline."""
    _check_class(config, source, "AutoencoderKL")
    read = (
        "block_out_channels",
        "down_block_types",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "scaling_factor",
        "up_block_types",
    )
    _check_keys(config, source, read, _VAE_FIXED, _VAE_IGNORED)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(config.get(key, [kind])) != {kind}:
            raise UserError(f"{source}: {key} = {config[key]!r} is not supported, only {kind} is")
    return VAEConfig(
        latent_channels=config.get("latent_channels", 4),
        channels=tuple(config.get("block_out_channels", (64,))),
        blocks_per_level=config.get("layers_per_block", 1),
        norm_groups=config.get("norm_num_groups", 32),
        scaling_factor=config.get("scaling_factor", 0.08333),
    )


@_names_source
def read_tiny(config: Json, source: str) -> TinyDecoderConfig:
    """`config` of an AutoencoderTiny; what is about its encoder is ignored."""
    _check_class(config, source, "AutoencoderTiny")
    read = ("decoder_block_out_channels", "latent_channels", "num_decoder_blocks")
    _check_keys(config, source, read, _TINY_FIXED, _TINY_IGNORED)
    widths = set(config.get("decoder_block_out_channels", (64,)))
    if len(widths) != 1:
        raise UserError(f"{source}: decoder_block_out_channels has widths {sorted(widths)}, expected a single one")
    return TinyDecoderConfig(
        latent_channels=config.get("latent_channels", 4),
        width=widths.pop(),
        num_blocks=tuple(config.get("num_decoder_blocks", (3, 3, 3, 1))),
    )


@_names_source
def read_text(config: Json, source: str) -> TextConfig:
    """`config` of a CLIPTextModel; keys that do not change its last hidden state are many, and ignored."""
    found = config.get("model_type", "clip_text_model")
    if found != "clip_text_model":
        raise UserError(f"{source} describes a {found}, expected a clip_text_model")
    return TextConfig(
        width=config.get("hidden_size", 512),
        mlp_width=config.get("intermediate_size", 2048),
        num_layers=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 8),
        activation=config.get("hidden_act", "quick_gelu"),
        num_tokens=config.get("max_position_embeddings", 77),
        vocab_size=config.get("vocab_size", 49408),
        norm_eps=config.get("layer_norm_eps", 1e-5),
    )


@_names_source
def read_schedule(config: Json, source: str) -> ScheduleConfig:
    """A scheduler config. One of another class than DDPM gives what it shares with DDPM, its own keys are ignored."""
    ignored: Sequence[str] = _SCHEDULE_IGNORED
    if config.get("_class_name", "DDPMScheduler") != "DDPMScheduler":
        ignored = [key for key in config if key not in _SCHEDULE_READ and key not in _SCHEDULE_FIXED]
    _check_keys(config, source, _SCHEDULE_READ, _SCHEDULE_FIXED, ignored)
    return _named(source, lambda: ScheduleConfig(**{key: config[key] for key in _SCHEDULE_READ if key in config}))


def _named(source: str, build: Callable[[], Any]) -> Any:
    """A refusal by a dataclass does not know the file: add it."""
    try:
        return build()
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _up_block_types(encoder: UNetEncoderConfig) -> list[str]:
    return ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(encoder.attention)]


def _write_encoder(encoder: UNetEncoderConfig) -> Json:
    return {
        "act_fn": "silu",
        "attention_head_dim": list(encoder.num_heads),
        "block_out_channels": list(encoder.channels),
        "cross_attention_dim": encoder.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in encoder.attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": encoder.cos_first,
        "freq_shift": encoder.freq_shift,
        "in_channels": encoder.in_channels,
        "layers_per_block": _one_or_list(encoder.blocks_per_level),
        "mid_block_scale_factor": 1,
        "norm_eps": encoder.norm_eps,
        "norm_num_groups": encoder.norm_groups,
        "num_class_embeds": encoder.num_noise_levels,
        "only_cross_attention": list(encoder.only_cross_attention),
        "resnet_time_scale_shift": "default",
        "transformer_layers_per_block": _one_or_list(encoder.transformer_depth),
        "use_linear_projection": encoder.linear_projection,
    }


def _one_or_list(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def write_unet(config: UNetConfig) -> Json:
    """The inverse of `read_unet`."""
    return {
        "_class_name": "UNet2DConditionModel",
        **_write_encoder(config.encoder),
        "out_channels": config.out_channels,
        "up_block_types": _up_block_types(config.encoder),
    }


def write_tcm(config: TCMConfig) -> Json:
    """The inverse of `read_tcm`."""
    return {
        "_class_name": "ControlNetModel",
        **_write_encoder(config.encoder),
        "conditioning_channels": config.conditioning_channels,
        "conditioning_embedding_out_channels": list(config.conditioning_widths),
        "controlnet_conditioning_channel_order": "rgb",
    }


def write_vae(config: VAEConfig) -> Json:
    """The inverse of `read_vae`."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks_per_level,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.image_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def write_text(config: TextConfig) -> Json:
    """The inverse of `read_text`."""
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.num_tokens,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
    }


def write_schedule(config: ScheduleConfig) -> Json:
    """The inverse of `read_schedule`."""
    fixed = {key: values[0] for key, values in _SCHEDULE_FIXED.items()}
    return {"_class_name": "DDPMScheduler", **fixed, **{key: getattr(config, key) for key in _SCHEDULE_READ}}
