"""From published config files (diffusers, transformers) to our dataclasses and back; their keys: `published_keys`."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from stablevsr.config import (
    DDIMScheduleConfig,
    ScheduleConfig,
    TCMConfig,
    TemporalTinyConfig,
    TextConfig,
    TinyDecoderConfig,
    UNetConfig,
    UNetEncoderConfig,
    VAEConfig,
)
from stablevsr.convert import published_keys
from stablevsr.convert.published_keys import Json, Keys, Notify, shown
from stablevsr.errors import UserError, WeightsError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ConfigReader(Protocol[T_co]):
    """Reads a published config. Errors and notes name `source`, the file; errors are `WeightsError`."""

    def __call__(self, config: Json, source: str, notify: Notify | None = None) -> T_co: ...


def _reads(keys: Keys) -> Callable[[Callable[[Json, str], T]], ConfigReader[T]]:
    """Decorator of a reader that checks class and keys first."""

    def decorate(read: Callable[[Json, str], T]) -> ConfigReader[T]:
        @functools.wraps(read)
        def reader(config: Json, source: str, notify: Notify | None = None) -> T:
            keys.check(config, source)
            if notify is not None:
                keys.note_unknown(config, source, notify)
            try:
                return read(config, source)
            except UserError as error:  # a dataclass that rejects a value does not know the file
                message = str(error)
                raise WeightsError(message if message.startswith(source) else f"{source}: {message}") from error
            except (AttributeError, TypeError, ValueError) as error:
                raise WeightsError(f"{source} holds a value of the wrong type ({error}): download it again") from error

        return reader

    return decorate


def _per_level(value: Any, levels: int, key: str, source: str) -> tuple[Any, ...]:
    """Upstream writes one value for all levels, or one per level."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or any(isinstance(entry, list | tuple | type(None)) for entry in values):
        raise WeightsError(f"{source}: {key} = {shown(value)} is not supported, expected one value or {levels}")
    return values


def _read_encoder(config: Json, source: str) -> UNetEncoderConfig:
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(channels)

    def per_level(key: str, default: Any) -> tuple[Any, ...]:
        return _per_level(config.get(key, default), levels, key, source)

    attention = []
    for kind in per_level("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]):
        if kind not in ("DownBlock2D", "CrossAttnDownBlock2D"):
            raise WeightsError(
                f"{source}: a block of type {shown(kind)} is not supported, only (CrossAttn)DownBlock2D is"
            )
        attention.append(kind == "CrossAttnDownBlock2D")
    # A historic misnomer: "attention_head_dim" is the number of heads, unless there is "num_attention_heads".
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
        raise WeightsError(f"{source}: cross_attention_dim = {shown(value)} is not supported, expected one width")
    return widths.pop()


@_reads(published_keys.UNET)
def read_unet(config: Json, source: str) -> UNetConfig:
    """`config` of a UNet2DConditionModel."""
    encoder = _read_encoder(config, source)
    mirrored = _up_block_types(encoder)
    found = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(encoder.channels) - 1))
    if list(found) != mirrored:
        raise WeightsError(
            f"{source}: up_block_types = {shown(found)} is not supported, expected the mirror {mirrored}"
        )
    # Two keys that may state what follows from the others.
    implied = {
        "reverse_transformer_layers_per_block": list(reversed(encoder.transformer_depth)),
        "time_embedding_dim": encoder.time_dim,
    }
    for key, value in implied.items():
        if config.get(key) not in (None, value):
            raise WeightsError(f"{source}: {key} = {shown(config[key])} is not supported, only {value!r} or None is")
    return UNetConfig(encoder, config.get("out_channels", 4))


@_reads(published_keys.TCM)
def read_tcm(config: Json, source: str) -> TCMConfig:
    """`config` of a ControlNetModel."""
    widths = tuple(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))
    return TCMConfig(_read_encoder(config, source), config.get("conditioning_channels", 3), widths)


@_reads(published_keys.VAE)
def read_vae(config: Json, source: str) -> VAEConfig:
    """`config` of an AutoencoderKL. The scaling factor defaults to the SD x4 upscaler's, as in its pipeline."""
    channels = tuple(config.get("block_out_channels", (64,)))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        expected = [kind] * len(channels)
        if list(config.get(key, expected)) != expected:
            raise WeightsError(f"{source}: {key} = {shown(config[key])} is not supported, expected {expected}")
    return VAEConfig(
        latent_channels=config.get("latent_channels", 4),
        channels=channels,
        blocks_per_level=config.get("layers_per_block", 1),
        norm_groups=config.get("norm_num_groups", 32),
        scaling_factor=config.get("scaling_factor", 0.08333),
    )


@_reads(published_keys.TINY)
def read_tiny(config: Json, source: str) -> TinyDecoderConfig:
    """`config` of an AutoencoderTiny; keys of its encoder are ignored."""
    widths = set(config.get("decoder_block_out_channels", (64,)))
    if len(widths) != 1:
        raise WeightsError(f"{source}: decoder_block_out_channels has widths {sorted(widths)}, expected a single one")
    return TinyDecoderConfig(
        latent_channels=config.get("latent_channels", 4),
        width=widths.pop(),
        num_blocks=tuple(config.get("num_decoder_blocks", (3, 3, 3, 1))),
    )


def is_tiny(config: Json) -> bool:
    """Whether the `config` of a pipeline's autoencoder is a tiny one's, by its class or its keys."""
    return config.get("_class_name") in published_keys.TEMPORAL_TINY.classes or "num_decoder_blocks" in config


@_reads(published_keys.TEMPORAL_TINY)
def read_temporal_tiny(config: Json, source: str) -> TemporalTinyConfig:
    """`config` of a TemporalAutoencoderTiny: of one width, with a decoder that mirrors the encoder."""
    keys = ("encoder_block_out_channels", "decoder_block_out_channels")
    widths = {width for key in keys for width in config.get(key, (64,))}
    if len(widths) != 1:
        raise WeightsError(f"{source}: {' and '.join(keys)} have widths {shown(sorted(widths))}, expected a single one")
    down = tuple(config.get("num_encoder_blocks", (1, 3, 3, 3)))
    up = tuple(config.get("num_decoder_blocks", (3, 3, 3, 1)))
    if up != down[::-1]:
        raise WeightsError(
            f"{source}: num_decoder_blocks = {shown(up)}, expected num_encoder_blocks reversed, {down[::-1]}"
        )
    return TemporalTinyConfig(latent_channels=config.get("latent_channels", 4), width=widths.pop(), num_blocks=up)


@_reads(published_keys.TEXT)
def read_text(config: Json, source: str) -> TextConfig:
    """`config` of a CLIPTextModel."""
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


@_reads(published_keys.SCHEDULE)
def read_schedule(config: Json, source: str) -> ScheduleConfig:
    """A scheduler config as DDPMScheduler reads it, whichever class wrote it."""
    return ScheduleConfig(**{key: config[key] for key in published_keys.SCHEDULE.read if key in config})


@_reads(published_keys.DDIM_SCHEDULE)
def read_ddim_schedule(config: Json, source: str) -> DDIMScheduleConfig:
    """The same as DDIMScheduler reads it, for streaming weights."""
    return DDIMScheduleConfig(**{key: config[key] for key in published_keys.DDIM_SCHEDULE.read if key in config})


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


def write_temporal_tiny(config: TemporalTinyConfig) -> Json:
    """The inverse of `read_temporal_tiny`."""
    widths = [config.width] * len(config.num_blocks)
    return {
        "_class_name": "TemporalAutoencoderTiny",
        "act_fn": "relu",
        "block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "force_upcast": False,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": list(config.num_blocks),
        "num_encoder_blocks": list(config.num_blocks[::-1]),
        "out_channels": config.image_channels,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
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
    """The inverse of `read_schedule`, and for streaming weights of `read_ddim_schedule`."""
    fixed = {"rescale_betas_zero_snr": False, "thresholding": False, "trained_betas": None}
    if isinstance(config, DDIMScheduleConfig):
        read = {key: getattr(config, key) for key in published_keys.DDIM_SCHEDULE.read}
        return {"_class_name": "DDIMScheduler", **fixed, **read}
    read = {key: getattr(config, key) for key in published_keys.SCHEDULE.read}
    return {"_class_name": "DDPMScheduler", **fixed, "variance_type": "fixed_small", **read}
