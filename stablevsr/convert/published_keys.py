"""The keys of the published config files (diffusers, transformers), grouped by their effect on the result.

Every key that a config's class reads is either read by us, fixed to the values that our networks implement, or ignored
because it makes no difference here. A fixed key with another value is refused by name, so that a checkpoint never loads
as something it is not. A key unknown to the class as well (from an older or newer version, or a script) is reported and
ignored, as diffusers does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stablevsr.errors import WeightsError
from stablevsr.fields import shorten

Json = dict[str, Any]
Fixed = dict[str, tuple[Any, ...]]
Notify = Callable[[str], None]

OFF = (False, None)
MAX_NOTED = 8  # keys named in one note


def shown(value: Any) -> str:
    """A value for a message."""
    return shorten(repr(value), 100)


@dataclass(frozen=True)
class Keys:
    """The known keys of one class's config."""

    classes: tuple[str, ...]  # whose configs have these keys, the class itself first
    read: tuple[str, ...]
    fixed: Fixed = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    class_key: str = "_class_name"

    def check(self, config: Json, source: str) -> None:
        """Raises `WeightsError` for another class, and for a value that our networks do not implement."""
        found = config.get(self.class_key, self.classes[0])
        if found not in self.classes:
            expected = self.classes[0] if len(self.classes) == 1 else f"one of {', '.join(self.classes)}"
            name = found if isinstance(found, str) else shown(found)
            raise WeightsError(f"{source} describes a {name}, expected {expected}: it belongs to another model")
        for key, choices in self.fixed.items():
            if key in config and config[key] not in choices:
                supported = " or ".join(map(repr, choices))
                raise WeightsError(f"{source}: {key} = {shown(config[key])} is not supported, only {supported} is")

    def note_unknown(self, config: Json, source: str, notify: Notify) -> None:
        """Report keys that the class does not read, if any, in one note."""
        known = {*self.read, *self.fixed, *self.ignored, self.class_key}
        unknown = sorted(key for key in config if not (key in known or key.startswith("_")))
        if unknown:
            names = [key if key.isidentifier() else shown(key) for key in unknown[:MAX_NOTED]]
            more = f" and {len(unknown) - MAX_NOTED} more" if len(unknown) > MAX_NOTED else ""
            notify(f"{source}: ignored {', '.join(names)}{more}, which {self.classes[0]} does not read")


_ENCODER_READ = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "only_cross_attention",
    "attention_head_dim",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
    "num_class_embeds",
)
_ENCODER_FIXED: Fixed = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_time_scale_shift": ("default",),
}
_ENCODER_IGNORED = (
    "upcast_attention",  # our attention always has a float32 softmax
    # Sizes of embeddings that are enabled by addition_embed_type and class_embed_type, fixed above.
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)

UNET = Keys(
    classes=("UNet2DConditionModel",),
    read=(
        *_ENCODER_READ,
        "out_channels",
        "reverse_transformer_layers_per_block",
        "time_embedding_dim",
        "up_block_types",
    ),
    fixed={
        **_ENCODER_FIXED,
        "attention_type": ("default",),
        "center_input_sample": OFF,
        "class_embeddings_concat": OFF,
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dual_cross_attention": OFF,
        "num_attention_heads": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    },
    ignored=(
        *_ENCODER_IGNORED,
        "dropout",  # of training
        "sample_size",  # of the training pictures
        # Of block types that are refused.
        "cross_attention_norm",
        "mid_block_only_cross_attention",
        "resnet_out_scale_factor",
        "resnet_skip_time_act",
    ),
)

TCM = Keys(
    classes=("ControlNetModel",),
    read=(*_ENCODER_READ, "conditioning_channels", "conditioning_embedding_out_channels", "num_attention_heads"),
    fixed={
        **_ENCODER_FIXED,
        "controlnet_conditioning_channel_order": ("rgb",),
        "global_pool_conditions": OFF,
    },
    ignored=_ENCODER_IGNORED,
)

VAE = Keys(
    classes=("AutoencoderKL",),
    read=(
        "block_out_channels",
        "down_block_types",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "scaling_factor",
        "up_block_types",
    ),
    fixed={
        "act_fn": ("silu", "swish"),
        "in_channels": (3,),
        "out_channels": (3,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "shift_factor": (None, 0.0),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    ignored=("force_upcast", "sample_size"),
)

TINY = Keys(
    classes=("AutoencoderTiny",),
    read=("decoder_block_out_channels", "latent_channels", "num_decoder_blocks"),
    fixed={
        "act_fn": ("relu",),
        "out_channels": (3,),
        "scaling_factor": (1.0,),  # it decodes scaled latents
        "shift_factor": (None, 0.0),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
    },
    ignored=(
        "block_out_channels",  # repeats the decoder's
        "encoder_block_out_channels",
        "force_upcast",
        "in_channels",
        "latent_magnitude",  # this and latent_shift: for latents stored as pictures
        "latent_shift",
        "num_encoder_blocks",
    ),
)

# Also under AutoencoderTiny's name: the class is the publisher's own, and not every file names it.
TEMPORAL_TINY = Keys(
    classes=("TemporalAutoencoderTiny", "AutoencoderTiny"),
    read=("encoder_block_out_channels", "num_encoder_blocks", *TINY.read),
    fixed={**TINY.fixed, "in_channels": (3,)},
    ignored=tuple({*TINY.ignored} - {"encoder_block_out_channels", "in_channels", "num_encoder_blocks"}),
)

TEXT = Keys(
    class_key="model_type",
    classes=("clip_text_model",),
    read=(
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ),
    # None of these affects the last hidden state, the only output used.
    ignored=(
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dropout",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "projection_dim",
        "return_dict",
        "torch_dtype",
        "transformers_version",
    ),
)

SCHEDULE = Keys(
    # Those that DDPMScheduler.from_config accepts: all describe the same noise schedule, for other solvers.
    classes=(
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "UniPCMultistepScheduler",
    ),
    read=(
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "clip_sample",
        "clip_sample_range",
        "timestep_spacing",
        "steps_offset",
    ),
    fixed={
        "predict_epsilon": (True, None),  # the predecessor of prediction_type before diffusers 0.9
        "rescale_betas_zero_snr": OFF,
        "thresholding": OFF,
        "trained_betas": (None,),
        "use_flow_sigmas": OFF,  # flow matching instead of diffusion
        "variance_type": ("fixed_small", None),
    },
    ignored=(
        # For refused values of the keys above.
        "dynamic_thresholding_ratio",
        "flow_shift",
        "sample_max_value",
        "shift_terminal",
        "time_shift_type",
        "use_dynamic_shifting",
        # Of other solvers. A config converted from one class to another keeps the keys of the first.
        "algorithm_type",
        "disable_corrector",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "predict_x0",
        "set_alpha_to_one",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "timestep_type",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
    ),
)

# For streaming weights, whose pipeline reads it as a DDIMScheduler.
DDIM_SCHEDULE = Keys(
    classes=("DDIMScheduler", *(name for name in SCHEDULE.classes if name != "DDIMScheduler")),
    read=(*SCHEDULE.read, "set_alpha_to_one"),
    fixed=SCHEDULE.fixed,
    ignored=tuple(key for key in SCHEDULE.ignored if key != "set_alpha_to_one"),
)
