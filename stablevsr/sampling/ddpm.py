"""DDPM (Ho et al. 2020) as equations on tensors. `alpha_bar` is abar_t throughout, float32, broadcastable.

The papers write the step with the predicted noise e (algorithm 2 of Ho et al.; StableVSR, section 3):

    x_{t-1} = (x_t - (1 - a_t) / sqrt(1 - abar_t) e) / sqrt(a_t) + s_t z        `paper_step`
    x_0     = (x_t - sqrt(1 - abar_t) e) / sqrt(abar_t)                         `predict_x0`, equation 15

The sampler uses the equivalent form through x_0 (equations 6 and 7), which allows x_0 to be clipped, is the same for
every prediction type, and is what the published pipeline computes.
"""

import torch
from torch import Tensor

from stablevsr.config import ScheduleConfig
from stablevsr.sampling.schedule import Step

MIN_VARIANCE = 1e-20  # as in the reference, which takes the log: the posterior of the last step has zero variance


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process q(x_t | x_0) (equation 4): sqrt(abar) x_0 + sqrt(1 - abar) noise."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise


def v_target(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = sqrt(abar) noise - sqrt(1 - abar) x_0 (Salimans and Ho 2022, appendix D)."""
    return alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0


def predict_x0(x: Tensor, prediction: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The clean estimate from x_t and the network's output: "epsilon" (equation 15), "v_prediction" or "sample"."""
    if prediction_type == "epsilon":
        return (x - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * prediction
    if prediction_type == "sample":
        return prediction
    raise ValueError(f"prediction_type {prediction_type!r} is none of epsilon, v_prediction, sample")


def posterior(x0: Tensor, x: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_next | x_t, x_0) (equations 6 and 7), the variance clamped at `MIN_VARIANCE`."""
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    mean = (alpha_bar_next**0.5 * beta) / (1 - alpha_bar) * x0 + alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar) * x
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * beta
    return mean, variance.clamp(min=MIN_VARIANCE)


def paper_step(x: Tensor, noise_estimate: Tensor, z: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """x at the next timestep in the papers' form (algorithm 2): from x_t, the predicted noise and fresh noise z."""
    alpha = alpha_bar / alpha_bar_next
    mean = (x - (1 - alpha) / (1 - alpha_bar) ** 0.5 * noise_estimate) / alpha**0.5
    sigma = ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)) ** 0.5
    return mean + sigma * z


def clean_estimate(x: Tensor, prediction: Tensor, step: Step, config: ScheduleConfig) -> Tensor:
    """`predict_x0` at a step, clipped if the schedule clips."""
    x0 = predict_x0(x, prediction, step.alpha_bar, config.prediction_type)
    return x0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0


def ddpm_step(
    x: Tensor, prediction: Tensor, noise: Tensor, step: Step, config: ScheduleConfig, x0_prev: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One reverse step.

    Args:
        x: x_t, float32.
        prediction: the network's output for x_t, the same shape.
        noise: fresh unit Gaussian noise, the same shape; unused at timestep 0.
        x0_prev: unused; other samplers take the x0 estimate of the previous step.

    Returns:
        The x0 estimate (clipped if the schedule clips), and x at the next timestep.
    """
    x0 = clean_estimate(x, prediction, step, config)
    mean, variance = posterior(x0, x, step.alpha_bar, step.alpha_bar_next)
    if step.timestep == 0:
        return x0, mean
    return x0, mean + torch.sqrt(variance) * noise
