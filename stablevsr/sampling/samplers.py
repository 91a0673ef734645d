"""Samplers by name: DDPM, and for fewer steps DDIM (Song et al. 2021) and DPM-Solver++ (Lu et al. 2022)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stablevsr.config import ScheduleConfig
from stablevsr.sampling.config import SAMPLERS
from stablevsr.sampling.ddpm import clean_estimate, ddpm_step, posterior
from stablevsr.sampling.schedule import Step

# (x, prediction, noise, step, schedule, x0 of the previous step or None) -> (x0, x at the next timestep)
StepFunction = Callable[[Tensor, Tensor, Tensor, Step, ScheduleConfig, Tensor | None], tuple[Tensor, Tensor]]


class Sampler(NamedTuple):
    """The step from one noise level to the next, and what it uses."""

    step: StepFunction
    keeps_x0: bool  # whether the step needs the frame's previous clean estimate
    adds_noise: bool  # whether the step uses its noise argument


def predict_noise(x: Tensor, prediction: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise in x_t, from the network's output."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * x
    return (x - alpha_bar**0.5 * prediction) / (1 - alpha_bar) ** 0.5


def ddim_step(
    x: Tensor,
    prediction: Tensor,
    noise: Tensor,
    step: Step,
    config: ScheduleConfig,
    x0_prev: Tensor | None = None,
    *,
    eta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of DDIM (equation 12); the arguments are those of `ddpm_step`.

    Args:
        x0_prev: unused.
        eta: 0 adds no noise, 1 as much as DDPM (equation 16).
    """
    x0 = clean_estimate(x, prediction, step, config)
    direction = predict_noise(x, prediction, step.alpha_bar, config.prediction_type)
    _, variance = posterior(x0, x, step.alpha_bar, step.alpha_bar_next)
    sigma = eta * variance.sqrt()
    rest = (1 - step.alpha_bar_next - sigma**2).clamp(min=0).sqrt()
    return x0, step.alpha_bar_next**0.5 * x0 + rest * direction + sigma * noise


def dpm_solver_step(
    x: Tensor,
    prediction: Tensor,
    noise: Tensor,
    step: Step,
    config: ScheduleConfig,
    x0_prev: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of DPM-Solver++(2M) (algorithm 2); the arguments are those of `ddpm_step`.

    The first and the last step are of first order, the last one because it ends without noise.

    Args:
        noise: unused.
        x0_prev: the x0 estimate of the previous step, None in the first.
    """
    x0 = clean_estimate(x, prediction, step, config)
    if step.alpha_bar_next == 1:
        return x0, x0
    alpha_next, sigma_next = step.alpha_bar_next**0.5, (1 - step.alpha_bar_next) ** 0.5
    h = log_snr(step.alpha_bar_next) - log_snr(step.alpha_bar)
    estimate = x0
    if x0_prev is not None and step.alpha_bar_prev is not None:
        ratio = (log_snr(step.alpha_bar) - log_snr(step.alpha_bar_prev)) / h
        estimate = x0 + (x0 - x0_prev) / (2 * ratio)
    return x0, sigma_next / (1 - step.alpha_bar) ** 0.5 * x - alpha_next * torch.expm1(-h) * estimate


def log_snr(alpha_bar: Tensor) -> Tensor:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return 0.5 * (alpha_bar / (1 - alpha_bar)).log()


DDPM = Sampler(ddpm_step, keeps_x0=False, adds_noise=True)
DDIM = Sampler(ddim_step, keeps_x0=False, adds_noise=False)


def sampler_by_name(name: str, eta: float = 0.0) -> Sampler:
    """One of `config.SAMPLERS`; `eta` is DDIM's."""
    assert name in SAMPLERS, name
    if name == "ddim":
        return Sampler(partial(ddim_step, eta=eta), keeps_x0=False, adds_noise=True) if eta else DDIM
    return DDPM if name == "ddpm" else Sampler(dpm_solver_step, keeps_x0=True, adds_noise=False)
