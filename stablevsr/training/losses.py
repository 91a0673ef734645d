"""The losses of each network as pure functions: tensors and random draws in, a scalar loss out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.config import ScheduleConfig
from stablevsr.nn.raft import RAFT
from stablevsr.nn.tiny import TemporalTinyVAE, TinyDecoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE
from stablevsr.nn.warp import warp_published
from stablevsr.sampling.ddpm import add_noise, predict_x0, v_target
from stablevsr.sampling.flow import estimate_flow
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.schedule import alphas_cumprod


@dataclass(frozen=True)
class Draws:
    """The random draws for a batch of n images."""

    timestep: Tensor  # (n,) integers in [0, num_train_timesteps)
    noise: Tensor  # (n, latent channels, h, w) unit Gaussian, for the forward process
    posterior: Tensor  # same shape, unit Gaussian, to sample the VAE's posterior
    noise_level: Tensor | None = None  # (n,) integers, for models conditioned on the noise level of the LR frame
    low_res_noise: Tensor | None = None  # (n, 3, h, w) unit Gaussian, with noise_level


def alpha_bar_at(schedule: ScheduleConfig, timestep: Tensor) -> Tensor:
    """abar_t per sample, (n, 1, 1, 1)."""
    return alphas_cumprod(schedule).to(timestep.device)[timestep][:, None, None, None]


def autoencoder_of(model: Networks) -> VAE:
    """The VAE; `train` rejects streaming weights in stages that need it."""
    assert isinstance(model.vae, VAE)
    return model.vae


def temporal_autoencoder_of(model: Networks) -> TemporalTinyVAE:
    """The temporal tiny autoencoder; `train` rejects other weights in stages that need it."""
    assert isinstance(model.vae, TemporalTinyVAE)
    return model.vae


def flow_network_of(model: Networks) -> RAFT:
    """The flow network; `train` checks that it exists where a stage needs it."""
    assert model.flow is not None
    return model.flow


def tiny_decoder_of(model: Networks) -> TinyDecoder:
    """The tiny decoder; `train` checks that it exists where a stage needs it."""
    assert model.tiny is not None
    return model.tiny


def encode_latent(vae: VAE, picture: Tensor, posterior: Tensor) -> Tensor:
    """Posterior sample times the scaling factor: (n, 3, 4h, 4w) in [-1, 1] to (n, latent channels, h, w)."""
    return vae.encode(picture).sample(posterior) * vae.scaling_factor


def noised_low_res(model: Networks, low_res: Tensor, draws: Draws) -> Tensor:
    """The LR conditioning (n, 3, h, w) of the UNet: noised for models conditioned on the noise level."""
    schedule = model.config.low_res_schedule
    if draws.noise_level is None or draws.low_res_noise is None or schedule is None:
        return low_res
    return add_noise(low_res, draws.low_res_noise, alpha_bar_at(schedule, draws.noise_level))


def denoising_target(latent: Tensor, draws: Draws, schedule: ScheduleConfig) -> Tensor:
    """The regression target: noise, v or latent, by the prediction type."""
    if schedule.prediction_type == "epsilon":
        return draws.noise
    if schedule.prediction_type == "v_prediction":
        return v_target(latent, draws.noise, alpha_bar_at(schedule, draws.timestep))
    return latent


def denoiser_loss(
    unet: UNet, latent: Tensor, low_res: Tensor, context: Tensor, draws: Draws, schedule: ScheduleConfig
) -> Tensor:
    """Loss of the base model: MSE of the prediction, conditioned on the LR frame (Ho et al. 2020, equation 14).

    Args:
        latent: (n, latent channels, h, w), scaled.
        low_res: (n, 3, h, w) in [-1, 1].
        context: (n, tokens, width).
    """
    noisy = add_noise(latent, draws.noise, alpha_bar_at(schedule, draws.timestep))
    prediction = unet(torch.cat([noisy, low_res], dim=1), draws.timestep, context, draws.noise_level)
    return F.mse_loss(prediction.float(), denoising_target(latent, draws, schedule).float())


def clean_estimate_of(model: Networks, picture: Tensor, low_res: Tensor, context: Tensor, draws: Draws) -> Tensor:
    """The UNet's x0 estimate for a noised image, without the TCM: (n, latent channels, h, w), scaled."""
    schedule = model.config.schedule
    latent = encode_latent(autoencoder_of(model), picture, draws.posterior)
    alpha_bar = alpha_bar_at(schedule, draws.timestep)
    noisy = add_noise(latent, draws.noise, alpha_bar)
    network_input = torch.cat([noisy, noised_low_res(model, low_res, draws)], dim=1)
    prediction = model.unet(network_input, draws.timestep, context, draws.noise_level)
    return predict_x0(noisy, prediction.float(), alpha_bar, schedule.prediction_type).to(latent.dtype)


@torch.no_grad()
def training_guidance(
    model: Networks, neighbour: Tensor, neighbour_low_res: Tensor, low_res: Tensor, context: Tensor, draws: Draws
) -> Tensor:
    """Temporal Texture Guidance in training: the neighbour's x0 by the UNet alone, decoded and warped to the frame.

    Args:
        neighbour: (n, 3, 4h, 4w) in [-1, 1], the HR neighbours.
        neighbour_low_res, low_res: (n, 3, h, w) in [-1, 1], LR neighbours and current frames.
        draws: for the neighbours.

    Returns:
        (n, 3, 4h, 4w), roughly in [-1, 1].
    """
    x0 = clean_estimate_of(model, neighbour, neighbour_low_res, context, draws)
    picture = model.vae.decode(x0 / model.vae.scaling_factor)
    with torch.autocast(picture.device.type, enabled=False):  # half precision rounds coordinates by whole pixels
        return warp_published(picture.float(), estimate_flow(flow_network_of(model), low_res, neighbour_low_res))


def tcm_loss(
    model: Networks,
    frame: Tensor,
    neighbour: Tensor,
    low_res: Tensor,
    neighbour_low_res: Tensor,
    context: Tensor,
    draws: Draws,
    neighbour_draws: Draws,
) -> Tensor:
    """Loss of the TCM (paper, section 4.1, and the published training step); all other parts are frozen.

    The published code always computes x0 by the formula for v; here it follows the prediction type.

    Args:
        frame, neighbour: (n, 3, 4h, 4w) in [-1, 1], each current frame and its previous or next frame.
        low_res, neighbour_low_res: (n, 3, h, w) in [-1, 1].
        context: (n, tokens, width).
        draws, neighbour_draws: independent, but with the same timesteps.
    """
    assert torch.equal(draws.timestep, neighbour_draws.timestep), "a frame and its neighbour share the timestep"
    schedule = model.config.schedule
    guidance = training_guidance(model, neighbour, neighbour_low_res, low_res, context, neighbour_draws)
    with torch.no_grad():
        latent = encode_latent(autoencoder_of(model), frame, draws.posterior)
    noisy = add_noise(latent, draws.noise, alpha_bar_at(schedule, draws.timestep))
    network_input = torch.cat([noisy, noised_low_res(model, low_res, draws)], dim=1)
    residuals = model.tcm(network_input, draws.timestep, context, guidance, noise_level=draws.noise_level)
    prediction = model.unet(network_input, draws.timestep, context, draws.noise_level, residuals)
    return F.mse_loss(prediction.float(), denoising_target(latent, draws, schedule).float())


def autoencoder_loss(vae: VAE, picture: Tensor, latent_noise: Tensor) -> Tensor:
    """Reconstruction without a perceptual network: L1 + 2 MSE + 0.3 gradient + 2 low-pass L1 + 0.1 (1 - SSIM).

    The decoder sees the posterior mean plus small fixed noise, as a wide posterior hardly trains at first; the
    predicted variance is regressed to that noise level. The low-pass term anchors absolute colour, which group norm
    hides.

    Args:
        picture: (n, 3, 4h, 4w) in [-1, 1].
        latent_noise: (n, latent channels, h, w), added to the scaled latent; standard deviation about 0.03.
    """
    posterior = vae.encode(picture)
    latent, log_variance = posterior.mean.float(), posterior.log_variance.float()
    # Noise level and unit variance refer to the scaled latents, which are what the diffusion model sees.
    restored = vae.decode(latent + latent_noise / vae.scaling_factor).float()
    scaled = latent * vae.scaling_factor
    scaled_log_variance = log_variance + 2 * math.log(vae.scaling_factor)
    error = restored - picture
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    low_pass = F.avg_pool2d(error, 8, ceil_mode=True).abs().mean()
    # Unit variance gives the noise its scale and is what the diffusion model expects.
    spread = 0.01 * (scaled.mean(dim=(0, 2, 3)) ** 2 + (scaled.std(dim=(0, 2, 3)) - 1) ** 2).mean()
    variance = 0.001 * ((scaled_log_variance - 2 * latent_noise.std().log()) ** 2).mean()
    structure = 0.1 * (1 - ssim(restored, picture))
    loss = error.abs().mean() + 2 * (error**2).mean() + 0.3 * gradient + 2 * low_pass + structure + spread + variance
    return loss


def tiny_decoder_loss(model: Networks, picture: Tensor, draws: Draws, low_res: Tensor, context: Tensor) -> Tensor:
    """Distillation of the tiny decoder: L1 and gradient loss against the VAE decoder, on x0 estimates.

    Temporal guidance decodes x0 estimates, which are smooth at high noise levels, so the tiny decoder trains on these.

    Args:
        picture: (n, 3, 4h, 4w) in [-1, 1].
        low_res: (n, 3, h, w) in [-1, 1].
        context: (n, tokens, width).
    """
    with torch.no_grad():
        estimate = clean_estimate_of(model, picture, low_res, context, draws)
        target = model.vae.decode(estimate / model.vae.scaling_factor).float()
    error = tiny_decoder_of(model)(estimate).float() - target
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean SSIM (Wang et al. 2004) of images in [-1, 1], with a uniform window; differentiable, for losses."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean()


def flow_loss(
    raft: RAFT, picture1: Tensor, picture2: Tensor, flow: Tensor, valid: Tensor, gamma: float = 0.8
) -> Tensor:
    """RAFT's sequence loss (Teed and Deng 2020, equation 7): L1 of all predictions, with more weight on later ones.

    Args:
        picture1, picture2: (n, 3, h, w) in [-1, 1].
        flow: (n, 2, h, w), ground truth in pixels on the grid of picture1.
        valid: (n, h, w) booleans; other pixels are ignored.
        gamma: weight of each prediction relative to the next one.
    """
    with torch.autocast(flow.device.type, enabled=False):  # half precision rounds coordinates by whole pixels
        predictions = raft.predictions(picture1, picture2)
    weight = valid[:, None].to(flow.dtype)
    total = flow.new_zeros(())
    for i, prediction in enumerate(reversed(predictions)):
        total = total + gamma**i * (weight * (prediction - flow).abs()).sum() / (2 * weight.sum()).clamp(min=1)
    return total
