"""What each network is made of: frozen dataclasses that refuse nonsense.

The configuration of a model travels in the metadata of its weights file as JSON (`to_dict`, `from_dict`).
"""

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from stablevsr.errors import UserError

# What --dtype takes, and PyTorch's names for it.
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

SCALE = 4  # StableVSR upscales by four: the VAE's latent grid is the low-resolution grid

# Bounds on what a file may ask for, far above any published network: a damaged or hostile configuration is refused
# before modules are built for it.
MAX_WIDTH = 2**16  # channels, attention heads, tokens
MAX_ROWS = 2**20  # vocabulary, noise levels, timesteps
MAX_BLOCKS = 256  # residual and transformer blocks of a network
MAX_LEVELS = 16


def shorten(text: str, most: int = 300) -> str:
    """`text`, cut where it gets too long for a message: a damaged file may hold anything."""
    return text if len(text) <= most else f"{text[:most]}..."


def _require(ok: bool, owner: object, message: str) -> None:
    if not ok:
        raise UserError(f"{type(owner).__name__}: {shorten(message)}")


def require_types(owner: Any) -> None:
    """Every field has its declared type: a number of another kind, or a word for a truth value, is a mistake."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        expected = "a finite number" if hint is float else getattr(hint, "__name__", hint)
        _require(_fits(value, hint), owner, f"{name} is {shorten(repr(value), 100)}, expected {expected}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        options = typing.get_args(hint)
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, typing.get_args(hint)[1]) for item in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which NaN and infinity are not
    return type(value) is hint or (dataclasses.is_dataclass(hint) and isinstance(value, hint))


def _require_positive(owner: object, *names: str) -> None:
    """The named fields, numbers or tuples of numbers, must be above zero."""
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        _require(len(values) > 0 and min(values) > 0, owner, f"{name} must be positive, got {value}")


def _require_size(owner: object, *names: str, most: int = MAX_WIDTH) -> None:
    """The named fields, numbers or tuples of numbers, must be positive and at most `most`."""
    _require_positive(owner, *names)
    for name in names:
        value = getattr(owner, name)
        largest = max(value) if isinstance(value, tuple) else value
        _require(largest <= most, owner, f"{name} holds {largest}, expected at most {most}: no such network is known")


def _require_norm_groups(owner: object, channels: tuple[int, ...], groups: int) -> None:
    for width in channels:
        _require(width % groups == 0, owner, f"a level of {width} channels does not divide into norm_groups = {groups}")


def _require_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    _require(value in choices, owner, f"{name} {value!r} is not supported, only {', '.join(map(repr, choices))} are")


@dataclass(frozen=True)
class UNetEncoderConfig:
    """The encoder and middle of the SD x4 UNet, which the TCM copies (paper, section 4.1)."""

    in_channels: int = 7  # noisy latent and low-resolution frame, stacked
    channels: tuple[int, ...] = (256, 512, 512, 1024)  # width of each level, finest first
    blocks_per_level: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks of each level on the way down
    attention: tuple[bool, ...] = (False, True, True, True)  # levels with a transformer behind each residual block
    # Levels whose "self" attention looks at the text context instead of the picture; no effect without attention.
    only_cross_attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads of each level (upstream: "attention_head_dim")
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)  # transformer blocks in each transformer of a level
    context_dim: int = 1024  # width of the text context
    linear_projection: bool = True  # transformer in and out projections: linear layers, or 1x1 convolutions
    norm_groups: int = 32
    norm_eps: float = 1e-5
    cos_first: bool = True  # time embedding: cosines before sines
    freq_shift: float = 0.0  # time embedding: subtracted from the number of frequencies
    num_noise_levels: int | None = None  # entries of the noise-level embedding of stock SD x4 files

    def __post_init__(self) -> None:
        require_types(self)
        _require_size(self, "in_channels", "channels", "num_heads", "context_dim", "norm_groups")
        _require_size(self, "blocks_per_level", "transformer_depth", most=MAX_BLOCKS)
        _require_positive(self, "norm_eps")
        levels = len(self.channels)
        _require(levels <= MAX_LEVELS, self, f"channels has {levels} levels, expected at most {MAX_LEVELS}")
        for name in ("blocks_per_level", "attention", "only_cross_attention", "num_heads", "transformer_depth"):
            value = getattr(self, name)
            _require(len(value) == levels, self, f"{name} must have {levels} entries, one a level, got {value}")
        blocks = sum(
            count * (1 + depth) for count, depth in zip(self.blocks_per_level, self.transformer_depth, strict=True)
        )
        _require(blocks <= MAX_BLOCKS, self, f"there are {blocks} blocks in all, expected at most {MAX_BLOCKS}")
        _require_norm_groups(self, self.channels, self.norm_groups)
        for width, heads in zip(self.channels, self.num_heads, strict=True):
            _require(width % heads == 0, self, f"a level of {width} channels does not divide into {heads} heads")
        half = self.channels[0] // 2  # the number of frequencies of the time embedding
        _require(self.channels[0] % 2 == 0, self, f"the first level must be even, got {self.channels[0]}")
        _require(self.freq_shift < half, self, f"freq_shift must be below {half}, got {self.freq_shift}")
        if self.num_noise_levels is not None:
            _require_size(self, "num_noise_levels", most=MAX_ROWS)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Width of every skip connection, in the order in which the encoder makes them."""
        skips = [self.channels[0]]
        for level, width in enumerate(self.channels):
            skips += [width] * self.blocks_per_level[level]
            if level < len(self.channels) - 1:
                skips.append(width)  # the stride-2 convolution to the next level
        return tuple(skips)


@dataclass(frozen=True)
class UNetConfig:
    """The denoising network: the encoder above, and a decoder that mirrors it with one more block a level."""

    encoder: UNetEncoderConfig = field(default_factory=UNetEncoderConfig)
    out_channels: int = 4

    def __post_init__(self) -> None:
        require_types(self)
        _require_size(self, "out_channels")


@dataclass(frozen=True)
class TCMConfig:
    """The Temporal Conditioning Module (paper, section 4.1): a ControlNet over the UNet's encoder."""

    encoder: UNetEncoderConfig = field(default_factory=UNetEncoderConfig)
    conditioning_channels: int = 3  # the warped picture of the neighbouring frame
    # Widths of the conditioning convolutions; each change of width halves the size: two steps, from HR to LR.
    conditioning_widths: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self) -> None:
        require_types(self)
        _require_size(self, "conditioning_channels", "conditioning_widths")
        _require(
            2 ** (len(self.conditioning_widths) - 1) == SCALE,
            self,
            f"conditioning_widths must have 3 entries (two stride-2 steps, x4 to x1), got {self.conditioning_widths}",
        )


@dataclass(frozen=True)
class VAEConfig:
    """The f4 autoencoder."""

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512)  # width of each level, finest first
    blocks_per_level: int = 2  # residual blocks of an encoder level; the decoder has one more
    norm_groups: int = 32
    scaling_factor: float = 0.08333  # latents are multiplied by it before diffusion

    def __post_init__(self) -> None:
        require_types(self)
        _require(
            2 ** (len(self.channels) - 1) == SCALE,
            self,
            f"channels must have 3 levels (an f4 autoencoder), got {self.channels}",
        )
        _require_size(self, "image_channels", "latent_channels", "channels", "norm_groups")
        _require_size(self, "blocks_per_level", most=MAX_BLOCKS)
        _require_positive(self, "scaling_factor")
        _require_norm_groups(self, self.channels, self.norm_groups)


@dataclass(frozen=True)
class TinyDecoderConfig:
    """The decoder of TAESD (Bohan 2023) at f4. Defaults are those of taesd-x4-upscaler."""

    image_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    num_blocks: tuple[int, ...] = (3, 3, 1)  # of each level, coarsest first

    def __post_init__(self) -> None:
        require_types(self)
        _require(
            2 ** (len(self.num_blocks) - 1) == SCALE,
            self,
            f"num_blocks must have 3 levels (an f4 decoder), got {self.num_blocks}",
        )
        _require_size(self, "image_channels", "latent_channels", "width")
        _require_size(self, "num_blocks", most=MAX_BLOCKS)


@dataclass(frozen=True)
class TemporalTinyConfig(TinyDecoderConfig):
    """The temporal tiny autoencoder of Stream-DiffVSR: TAESD at f4 with a temporal processor module in every block.

    The fields are those of its decoder, which the encoder mirrors. Defaults are the released ones.
    """


@dataclass(frozen=True)
class FlowConfig:
    """RAFT (Teed and Deng, ECCV 2020). `RAFT_LARGE` and `RAFT_SMALL` are the published ones."""

    block: str = "residual"  # "residual" (large) or "bottleneck" (small)
    feature_widths: tuple[int, ...] = (64, 64, 96, 128, 256)  # fnet: stem, three stages, output
    context_widths: tuple[int, ...] = (64, 64, 96, 128, 256)  # cnet; its output is split into hidden state and context
    context_norm: str = "batch"  # "batch" (large) or "none" (small); fnet always has instance norm
    corr_levels: int = 4
    corr_radius: int = 4
    motion_corr_widths: tuple[int, ...] = (256, 192)
    motion_flow_widths: tuple[int, ...] = (128, 64)
    motion_width: int = 128
    hidden_dim: int = 128
    gru_kernels: tuple[tuple[int, int], ...] = ((1, 5), (5, 1))  # one convolutional GRU for each kernel size
    flow_head_dim: int = 256
    convex_upsampling: bool = True  # learned x8 upsampling (large), or bilinear (small)
    num_updates: int = 12

    def __post_init__(self) -> None:
        require_types(self)
        _require_choice(self, "block", ("residual", "bottleneck"))
        _require_choice(self, "context_norm", ("batch", "none"))
        for name in ("feature_widths", "context_widths"):
            value = getattr(self, name)
            _require(len(value) == 5, self, f"{name} must have 5 entries, got {value}")
        _require(
            self.context_widths[-1] > self.hidden_dim,
            self,
            f"the last of context_widths must exceed hidden_dim = {self.hidden_dim}, got {self.context_widths[-1]}",
        )
        _require_size(self, "feature_widths", "context_widths", "motion_corr_widths", "motion_flow_widths")
        _require_size(self, "motion_width", "hidden_dim", "flow_head_dim")
        _require_size(self, "corr_levels", "corr_radius", most=MAX_LEVELS)
        _require_size(self, "num_updates", most=MAX_BLOCKS)
        _require(
            1 <= len(self.gru_kernels) <= MAX_LEVELS
            and all(len(kernel) == 2 and 1 <= min(kernel) <= max(kernel) <= MAX_LEVELS for kernel in self.gru_kernels),
            self,
            f"gru_kernels must be pairs of sizes from 1 to {MAX_LEVELS}, got {self.gru_kernels}",
        )


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text tower. The defaults are those of the released model (OpenCLIP ViT-H, last layer dropped)."""

    width: int = 1024
    mlp_width: int = 4096
    num_layers: int = 23
    num_heads: int = 16
    activation: str = "gelu"  # "gelu" (exact) or "quick_gelu"
    num_tokens: int = 77  # length of a tokenised prompt
    vocab_size: int = 49408
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_types(self)
        _require_choice(self, "activation", ("gelu", "quick_gelu"))
        _require_size(self, "width", "mlp_width", "num_heads", "num_tokens")
        _require_size(self, "num_layers", most=MAX_BLOCKS)
        _require_size(self, "vocab_size", most=MAX_ROWS)
        _require_positive(self, "norm_eps")
        _require(
            self.width % self.num_heads == 0, self, f"width {self.width} does not divide into {self.num_heads} heads"
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule of the diffusion process. Defaults are DDPM's usual ones, not the released model's."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"  # "linear", "scaled_linear" (linear in the root) or "squaredcos_cap_v2" (cosine)
    prediction_type: str = "epsilon"  # what the UNet predicts: "epsilon", "v_prediction" or "sample" (x0)
    clip_sample: bool = True  # clamp the x0 estimate to +-clip_sample_range
    clip_sample_range: float = 1.0
    timestep_spacing: str = "leading"  # "leading", "linspace" or "trailing"
    steps_offset: int = 0  # added to every timestep of "leading" spacing

    def __post_init__(self) -> None:
        require_types(self)
        _require_choice(self, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
        _require_choice(self, "prediction_type", ("epsilon", "v_prediction", "sample"))
        _require_choice(self, "timestep_spacing", ("leading", "linspace", "trailing"))
        _require_size(self, "num_train_timesteps", most=MAX_ROWS)
        _require_positive(self, "clip_sample_range")
        _require(self.steps_offset >= 0, self, f"steps_offset must not be negative, got {self.steps_offset}")
        _require(
            0 < self.beta_start <= self.beta_end < 1,
            self,
            f"betas must rise within (0, 1), got {self.beta_start} to {self.beta_end}",
        )


@dataclass(frozen=True)
class DDIMScheduleConfig(ScheduleConfig):
    """The schedule of streaming weights, which were distilled with DDIM's steps and learnt where the last one ends."""

    # The last step ends at abar = 1, in x0 itself; if not, at abar_0, with a trace of noise (Stream-DiffVSR).
    set_alpha_to_one: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """All parts together."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    tcm: TCMConfig = field(default_factory=TCMConfig)
    vae: VAEConfig | TemporalTinyConfig = field(default_factory=VAEConfig)  # the latter makes it a streaming model
    flow: FlowConfig | None = field(default_factory=FlowConfig)
    tiny: TinyDecoderConfig | None = None  # decodes for guidance, when asked to
    text: TextConfig | None = None  # None: the file holds the empty prompt's embedding only
    schedule: ScheduleConfig | DDIMScheduleConfig = field(default_factory=ScheduleConfig)
    # Noises the LR frame of models with a noise-level embedding, at most to max_noise_level.
    low_res_schedule: ScheduleConfig | None = None
    max_noise_level: int = 350
    context_tokens: int = 77  # of the empty prompt's embedding

    @property
    def is_streaming(self) -> bool:
        """Whether the weights were made for streaming: the past only, a few steps a frame (Stream-DiffVSR)."""
        return isinstance(self.vae, TemporalTinyConfig)

    def __post_init__(self) -> None:
        require_types(self)
        latent, image = self.vae.latent_channels, self.vae.image_channels
        for name, encoder in (("unet", self.unet.encoder), ("tcm", self.tcm.encoder)):
            _require(
                encoder.in_channels == latent + image,
                self,
                f"{name} takes {encoder.in_channels} channels, expected {latent} of the latent + {image} of the frame",
            )
        _require(
            self.unet.out_channels == latent,
            self,
            f"unet gives {self.unet.out_channels} channels, but the latent has {latent}",
        )
        _require(
            self.tcm.conditioning_channels == image,
            self,
            f"tcm is conditioned on {self.tcm.conditioning_channels} channels, but the vae decodes to {image}",
        )
        if self.tiny is not None:
            _require(
                (self.tiny.latent_channels, self.tiny.image_channels) == (latent, image),
                self,
                f"tiny decodes {self.tiny.latent_channels} channels to {self.tiny.image_channels}, "
                f"expected {latent} to {image}",
            )
        same = ("channels", "blocks_per_level", "context_dim")
        for name in same:
            ours, theirs = getattr(self.unet.encoder, name), getattr(self.tcm.encoder, name)
            _require(ours == theirs, self, f"unet and tcm must agree in {name}, got {ours} and {theirs}")
        if self.text is not None:
            _require(
                self.text.width == self.unet.encoder.context_dim,
                self,
                f"the text tower is {self.text.width} wide, the unet expects {self.unet.encoder.context_dim}",
            )
        levels = self.unet.encoder.num_noise_levels
        _require(
            (levels is None) == (self.low_res_schedule is None),
            self,
            f"a noise-level embedding needs a low_res_schedule and the reverse, got {levels} entries "
            f"and {'no' if self.low_res_schedule is None else 'a'} schedule",
        )
        _require(
            self.tcm.encoder.num_noise_levels in (None, levels),
            self,
            f"tcm embeds {self.tcm.encoder.num_noise_levels} noise levels, the unet {levels}",
        )
        _require_size(self, "max_noise_level", most=MAX_ROWS)
        _require_size(self, "context_tokens")
        if self.low_res_schedule is not None:
            limit = min(levels, self.low_res_schedule.num_train_timesteps) - 1
            _require(
                self.max_noise_level <= limit, self, f"max_noise_level is {self.max_noise_level}, expected <= {limit}"
            )
        if self.text is not None:
            _require(
                self.text.num_tokens == self.context_tokens,
                self,
                f"the text tower gives {self.text.num_tokens} tokens, the empty prompt has {self.context_tokens}",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`. Raises `UserError` for a key that `cls` does not have."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{cls.__name__} has no field {', '.join(unknown)}; the file may come from a newer version")
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if isinstance(value, dict) and typing.get_origin(hint) is not dict:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        classes = [option for option in options if dataclasses.is_dataclass(option)]
        if not classes:
            raise TypeError(f"an object, {value}, where none is expected")
        # Of several classes it is the one that has all the keys; from_dict tells what is wrong if there is none.
        fitting = (cls for cls in classes if set(value) <= {each.name for each in dataclasses.fields(cls)})
        return from_dict(next(fitting, classes[0]), value)
    if isinstance(value, list):
        return tuple(_from_json(None, item) for item in value)
    return value
