"""Published configurations by name: StableVSR, its base model, Stream-DiffVSR, RAFT; and the bundled small models."""

from dataclasses import replace

from stablevsr.config import (
    DDIMScheduleConfig,
    FlowConfig,
    ModelConfig,
    ScheduleConfig,
    TCMConfig,
    TemporalTinyConfig,
    TinyDecoderConfig,
    UNetConfig,
    UNetEncoderConfig,
    VAEConfig,
)

# The published optical flow networks.
RAFT_LARGE = FlowConfig()
RAFT_SMALL = FlowConfig(
    block="bottleneck",
    feature_widths=(32, 32, 64, 96, 128),
    context_widths=(32, 32, 64, 96, 160),
    context_norm="none",
    corr_radius=3,
    motion_corr_widths=(96,),
    motion_flow_widths=(64, 32),
    motion_width=82,
    hidden_dim=96,
    gru_kernels=((3, 3),),
    flow_head_dim=128,
    convex_upsampling=False,
)

STABLEVSR_SCHEDULE = ScheduleConfig(
    beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1
)
LOW_RES_SCHEDULE = ScheduleConfig(beta_schedule="squaredcos_cap_v2")

# The released model (ECCV 2024).
STABLEVSR = ModelConfig(schedule=STABLEVSR_SCHEDULE)

# Stream-DiffVSR (2025): StableVSR distilled to four steps, with a tiny autoencoder, for streaming.
STREAM_DIFFVSR = ModelConfig(
    vae=TemporalTinyConfig(),
    schedule=DDIMScheduleConfig(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
        set_alpha_to_one=False,
    ),
)

# The stock SD x4 upscaler, which conditions on the noise level of the LR frame.
_SD_X4_ENCODER = UNetEncoderConfig(num_noise_levels=1000)
SD_X4_UPSCALER = ModelConfig(
    unet=UNetConfig(_SD_X4_ENCODER),
    tcm=TCMConfig(_SD_X4_ENCODER),
    schedule=STABLEVSR_SCHEDULE,
    low_res_schedule=LOW_RES_SCHEDULE,
)

# The bundled model, small enough to train and run on two CPU cores: the same classes, a wider latent, RAFT small.
_SMALL_ENCODER = UNetEncoderConfig(
    in_channels=11,
    channels=(48, 64, 96, 128),
    blocks_per_level=(1, 1, 1, 1),
    num_heads=(4, 4, 4, 4),
    context_dim=32,
    norm_groups=16,
)
SMALL = ModelConfig(
    unet=UNetConfig(_SMALL_ENCODER, out_channels=8),
    tcm=TCMConfig(_SMALL_ENCODER, conditioning_widths=(16, 32, 48)),
    vae=VAEConfig(latent_channels=8, channels=(24, 48, 96), blocks_per_level=1, norm_groups=8, scaling_factor=1.0),
    flow=replace(RAFT_SMALL, num_updates=6),  # more make no difference at this size
    tiny=TinyDecoderConfig(latent_channels=8, width=16),
    schedule=STABLEVSR_SCHEDULE,
)
# The bundled model for streaming: the same networks, in the same latent space, around a temporal tiny autoencoder.
SMALL_STREAMING = replace(
    SMALL,
    vae=TemporalTinyConfig(latent_channels=8, width=24),
    tiny=None,
    schedule=DDIMScheduleConfig(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    ),
)
ARCHITECTURES = {
    "stablevsr": STABLEVSR,
    "sd_x4_upscaler": SD_X4_UPSCALER,
    "small": SMALL,
    "small_streaming": SMALL_STREAMING,
}
