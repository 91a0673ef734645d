"""The noise schedule: betas, their cumulative products, and the timesteps of a run."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stablevsr.config import ScheduleConfig
from stablevsr.errors import OptionsError
from stablevsr.sampling.config import steps_within


@dataclass(frozen=True)
class Step:
    """One noise level of a run.

    The cumulative products, and everything computed from them, stay float32 scalars, as in the reference:
    1 - abar_t / abar_next loses enough digits to matter when neighbouring timesteps are close.
    """

    index: int  # position in the run, from 0
    timestep: int  # t, in [0, num_train_timesteps)
    alpha_bar: Tensor  # abar_t
    alpha_bar_next: Tensor  # abar at the next timestep of the run, 1 after the last
    alpha_bar_prev: Tensor | None = None  # abar at the previous timestep of the run, None at the first


def betas(config: ScheduleConfig) -> Tensor:
    """The variances beta_t of the forward process (Ho et al. 2020), (num_train_timesteps,) float32."""
    n, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2

    def alpha_bar(time: float) -> float:  # Nichol and Dhariwal 2021, equation 17
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / n) / alpha_bar(i / n) for i in range(n)]
    return torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=torch.float32)


@functools.cache
def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """abar_t, the cumulative products of 1 - beta_t, (num_train_timesteps,) float32; cached: do not modify."""
    return torch.cumprod(1.0 - betas(config), dim=0)


def timesteps(config: ScheduleConfig, num_steps: int, strength: float = 1.0) -> list[int]:
    """The timesteps of a run, noisiest first. Spacings as in table 2 of Lin et al. 2023 (arXiv 2305.08891).

    Args:
        num_steps: of the whole schedule.
        strength: the share of it that is run, from above 0 to 1: its last, cleanest timesteps.

    Raises:
        OptionsError: when the schedule has fewer timesteps than `num_steps`, or the offset leads outside it.
    """
    n = config.num_train_timesteps
    if not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= n:
        raise OptionsError(f"got {num_steps} steps, expected 1 to {n}: this model was trained with {n} noise levels")
    if config.timestep_spacing == "linspace":
        found = np.linspace(0, n - 1, num_steps).round()[::-1]
    elif config.timestep_spacing == "leading":
        found = np.arange(num_steps, dtype=float)[::-1] * (n // num_steps) + config.steps_offset
    else:
        found = np.arange(n, 0, -n / num_steps)[:num_steps].round() - 1  # rounding may yield one too many
    times = [int(time) for time in found]
    if times[0] >= n:
        raise OptionsError(
            f"{num_steps} steps with steps_offset {config.steps_offset} start at timestep {times[0]}, but the model "
            f"has only {n}: use fewer steps"
        )
    return times[num_steps - steps_within(num_steps, strength) :]


def run_steps(config: ScheduleConfig, num_steps: int, strength: float = 1.0) -> list[Step]:
    """The steps of a run, in order; arguments as of `timesteps`.

    `abar_next` follows the list itself, which is right for every spacing.
    """
    products = alphas_cumprod(config)
    times = timesteps(config, num_steps, strength)
    bars = [products[time] for time in times]
    nexts, befores = [*bars[1:], torch.tensor(1.0)], [None, *bars[:-1]]
    return [Step(i, *each) for i, each in enumerate(zip(times, bars, nexts, befores, strict=True))]
