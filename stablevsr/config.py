"""The configurations of the networks, the noise schedule and the model: frozen dataclasses that check themselves.

A model's configuration travels in the metadata of its weights file as JSON (`to_dict`, `from_dict` of `fields`).
"""

from dataclasses import dataclass, field

from stablevsr.fields import require, require_choice, require_positive, require_size, require_types

# What --dtype takes, and PyTorch's names for it.
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

SCALE = 4  # StableVSR upscales by four: the VAE's latent grid is the low-resolution grid

# Upper bounds, far above any published network (`fields.MAX_WIDTH` is the one for widths): a damaged or hostile
# configuration is refused before modules are built from it.
MAX_ROWS = 2**20  # vocabulary, noise levels, timesteps
MAX_BLOCKS = 256  # residual and transformer blocks of a network
MAX_LEVELS = 16


def _require_norm_groups(owner: object, channels: tuple[int, ...], groups: int) -> None:
    for width in channels:
        require(width % groups == 0, owner, f"a level of {width} channels does not divide into norm_groups = {groups}")


@dataclass(frozen=True)
class UNetEncoderConfig:
    """The encoder and middle of the SD x4 UNet, which the TCM copies (paper, section 4.1)."""

    in_channels: int = 7  # noisy latent and low-resolution frame, stacked
    channels: tuple[int, ...] = (256, 512, 512, 1024)  # width of each level, finest first
    blocks_per_level: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks of each level on the way down
    attention: tuple[bool, ...] = (False, True, True, True)  # levels with a transformer after each residual block
    # Levels whose "self" attention attends to the text instead of the picture; no effect without attention.
    only_cross_attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads of each level (upstream: "attention_head_dim")
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)  # blocks in each transformer of a level
    context_dim: int = 1024  # width of the text context
    linear_projection: bool = True  # transformer in and out projections: linear layers, or 1x1 convolutions
    norm_groups: int = 32
    norm_eps: float = 1e-5
    cos_first: bool = True  # time embedding: cosines before sines
    freq_shift: float = 0.0  # time embedding: subtracted from the number of frequencies in the exponent
    num_noise_levels: int | None = None  # entries of the noise-level embedding of stock SD x4 files

    def __post_init__(self) -> None:
        require_types(self)
        require_size(self, "in_channels", "channels", "num_heads", "context_dim", "norm_groups")
        require_size(self, "blocks_per_level", "transformer_depth", limit=MAX_BLOCKS)
        require_positive(self, "norm_eps")
        levels = len(self.channels)
        require(levels <= MAX_LEVELS, self, f"channels has {levels} levels, expected at most {MAX_LEVELS}")
        for name in ("blocks_per_level", "attention", "only_cross_attention", "num_heads", "transformer_depth"):
            value = getattr(self, name)
            require(len(value) == levels, self, f"{name} must have {levels} entries, one per level, got {value}")
        blocks = sum(
            count * (1 + depth) for count, depth in zip(self.blocks_per_level, self.transformer_depth, strict=True)
        )
        require(blocks <= MAX_BLOCKS, self, f"there are {blocks} blocks in total, expected at most {MAX_BLOCKS}")
        _require_norm_groups(self, self.channels, self.norm_groups)
        for width, heads in zip(self.channels, self.num_heads, strict=True):
            require(width % heads == 0, self, f"a level of {width} channels does not divide into {heads} heads")
        half = self.channels[0] // 2  # the number of frequencies of the time embedding
        require(self.channels[0] % 2 == 0, self, f"the first level must be even, got {self.channels[0]}")
        require(self.freq_shift < half, self, f"freq_shift must be below {half}, got {self.freq_shift}")
        if self.num_noise_levels is not None:
            require_size(self, "num_noise_levels", limit=MAX_ROWS)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Width of every skip connection, in the encoder's order."""
        skips = [self.channels[0]]
        for level, width in enumerate(self.channels):
            skips += [width] * self.blocks_per_level[level]
            if level < len(self.channels) - 1:
                skips.append(width)  # the stride-2 convolution to the next level
        return tuple(skips)


@dataclass(frozen=True)
class UNetConfig:
    """The denoising network: the encoder above, and a decoder that mirrors it with one more block per level."""

    encoder: UNetEncoderConfig = field(default_factory=UNetEncoderConfig)
    out_channels: int = 4

    def __post_init__(self) -> None:
        require_types(self)
        require_size(self, "out_channels")


@dataclass(frozen=True)
class TCMConfig:
    """The Temporal Conditioning Module (paper, section 4.1): a ControlNet over the UNet's encoder."""

    encoder: UNetEncoderConfig = field(default_factory=UNetEncoderConfig)
    conditioning_channels: int = 3  # of the warped neighbouring frame
    # Widths of the conditioning convolutions; each change of width halves the size: two steps, from HR to LR.
    conditioning_widths: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self) -> None:
        require_types(self)
        require_size(self, "conditioning_channels", "conditioning_widths")
        require(
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
        require(
            2 ** (len(self.channels) - 1) == SCALE,
            self,
            f"channels must have 3 levels (an f4 autoencoder), got {self.channels}",
        )
        require_size(self, "image_channels", "latent_channels", "channels", "norm_groups")
        require_size(self, "blocks_per_level", limit=MAX_BLOCKS)
        require_positive(self, "scaling_factor")
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
        require(
            2 ** (len(self.num_blocks) - 1) == SCALE,
            self,
            f"num_blocks must have 3 levels (an f4 decoder), got {self.num_blocks}",
        )
        require_size(self, "image_channels", "latent_channels", "width")
        require_size(self, "num_blocks", limit=MAX_BLOCKS)


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
        require_choice(self, "block", ("residual", "bottleneck"))
        require_choice(self, "context_norm", ("batch", "none"))
        for name in ("feature_widths", "context_widths"):
            value = getattr(self, name)
            require(len(value) == 5, self, f"{name} must have 5 entries, got {value}")
        require(
            self.context_widths[-1] > self.hidden_dim,
            self,
            f"the last of context_widths must exceed hidden_dim = {self.hidden_dim}, got {self.context_widths[-1]}",
        )
        require_size(self, "feature_widths", "context_widths", "motion_corr_widths", "motion_flow_widths")
        require_size(self, "motion_width", "hidden_dim", "flow_head_dim")
        for name, counts in (("motion_corr_widths", (1, 2)), ("motion_flow_widths", (2,))):
            value = getattr(self, name)
            require(
                len(value) in counts, self, f"{name} must have {' or '.join(map(str, counts))} entries, got {value}"
            )
        require(self.motion_width > 2, self, f"motion_width must exceed 2, the flow in it, got {self.motion_width}")
        require_size(self, "corr_levels", "corr_radius", limit=MAX_LEVELS)
        require_size(self, "num_updates", limit=MAX_BLOCKS)
        require(
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
        require_choice(self, "activation", ("gelu", "quick_gelu"))
        require_size(self, "width", "mlp_width", "num_heads", "num_tokens")
        require_size(self, "num_layers", limit=MAX_BLOCKS)
        require_size(self, "vocab_size", limit=MAX_ROWS)
        require_positive(self, "norm_eps")
        require(
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
        require_choice(self, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
        require_choice(self, "prediction_type", ("epsilon", "v_prediction", "sample"))
        require_choice(self, "timestep_spacing", ("leading", "linspace", "trailing"))
        require_size(self, "num_train_timesteps", limit=MAX_ROWS)
        require_positive(self, "clip_sample_range")
        require(self.steps_offset >= 0, self, f"steps_offset must not be negative, got {self.steps_offset}")
        require(
            0 < self.beta_start <= self.beta_end < 1,
            self,
            f"betas must rise within (0, 1), got {self.beta_start} to {self.beta_end}",
        )


@dataclass(frozen=True)
class DDIMScheduleConfig(ScheduleConfig):
    """The schedule of streaming weights, which are distilled with DDIM steps and depend on where the last one ends."""

    # Whether the last step ends at abar = 1, that is, in x0; else it ends at abar_0, with a trace of noise (as
    # Stream-DiffVSR does).
    set_alpha_to_one: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """All parts of a model."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    tcm: TCMConfig = field(default_factory=TCMConfig)
    vae: VAEConfig | TemporalTinyConfig = field(default_factory=VAEConfig)  # TemporalTinyConfig: a streaming model
    flow: FlowConfig | None = field(default_factory=FlowConfig)
    tiny: TinyDecoderConfig | None = None  # decodes for temporal guidance, on request
    text: TextConfig | None = None  # None: the file holds the empty prompt's embedding only
    schedule: ScheduleConfig | DDIMScheduleConfig = field(default_factory=ScheduleConfig)
    # Noises the LR frames, up to max_noise_level, for models with a noise-level embedding.
    low_res_schedule: ScheduleConfig | None = None
    max_noise_level: int = 350
    context_tokens: int = 77  # of the empty prompt's embedding

    @property
    def is_streaming(self) -> bool:
        """Whether the weights are made for streaming: past frames only, a few steps per frame (Stream-DiffVSR)."""
        return isinstance(self.vae, TemporalTinyConfig)

    def __post_init__(self) -> None:
        require_types(self)
        require_size(self, "max_noise_level", limit=MAX_ROWS)
        require_size(self, "context_tokens")
        self._check_channels()
        for name in ("channels", "blocks_per_level", "context_dim"):
            ours, theirs = getattr(self.unet.encoder, name), getattr(self.tcm.encoder, name)
            require(ours == theirs, self, f"unet and tcm must agree in {name}, got {ours} and {theirs}")
        self._check_text()
        self._check_noise_level()

    def _check_channels(self) -> None:
        """The networks pass latents and pictures to each other, so their channels must agree."""
        latent, image = self.vae.latent_channels, self.vae.image_channels
        for name, encoder in (("unet", self.unet.encoder), ("tcm", self.tcm.encoder)):
            got, expected = encoder.in_channels, f"{latent} of the latent + {image} of the frame"
            require(got == latent + image, self, f"{name} takes {got} channels, expected {expected}")
        got = self.unet.out_channels
        require(got == latent, self, f"unet predicts {got} channels, but the latent has {latent}")
        got = self.tcm.conditioning_channels
        require(got == image, self, f"tcm is conditioned on {got} channels, but the vae decodes to {image}")
        if self.tiny is not None:
            pair = (self.tiny.latent_channels, self.tiny.image_channels)
            message = f"tiny decodes {pair[0]} channels to {pair[1]}, expected {latent} to {image}"
            require(pair == (latent, image), self, message)

    def _check_text(self) -> None:
        if self.text is None:
            return
        width, expected = self.text.width, self.unet.encoder.context_dim
        require(width == expected, self, f"the text tower is {width} wide, the unet expects {expected}")
        tokens, expected = self.text.num_tokens, self.context_tokens
        message = f"the text tower outputs {tokens} tokens, the empty prompt has {expected}"
        require(tokens == expected, self, message)

    def _check_noise_level(self) -> None:
        """The embedding of the noise level and the schedule that noises the LR frame come together, or not at all."""
        levels, schedule = self.unet.encoder.num_noise_levels, self.low_res_schedule
        require(
            (levels is None) == (schedule is None),
            self,
            "a noise-level embedding needs a low_res_schedule and the reverse, got "
            f"{levels or 'no'} entries and {'no' if schedule is None else 'a'} schedule",
        )
        embedded = self.tcm.encoder.num_noise_levels
        message = f"tcm embeds {embedded} noise levels, the unet {levels}"
        require(embedded in (None, levels), self, message)
        if levels is not None and schedule is not None:
            limit = min(levels, schedule.num_train_timesteps) - 1
            message = f"max_noise_level is {self.max_noise_level}, expected <= {limit}"
            require(self.max_noise_level <= limit, self, message)
