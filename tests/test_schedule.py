"""Schedule and DDPM equations against diffusers' DDPMScheduler."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from stablevsr.architectures import LOW_RES_SCHEDULE, STABLEVSR_SCHEDULE
from stablevsr.config import ScheduleConfig
from stablevsr.errors import UserError
from stablevsr.sampling import ddpm
from stablevsr.sampling.config import SAMPLERS
from stablevsr.sampling.samplers import ddim_step, dpm_solver_step, sampler_by_name
from stablevsr.sampling.schedule import alphas_cumprod, betas, run_steps, timesteps

SCHEDULES = [
    STABLEVSR_SCHEDULE,
    LOW_RES_SCHEDULE,
    ScheduleConfig(),
    ScheduleConfig(prediction_type="sample", timestep_spacing="linspace"),
    ScheduleConfig(
        beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    ),
    ScheduleConfig(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample_range=0.5),
]


def published(config: ScheduleConfig) -> DDPMScheduler:
    return DDPMScheduler(**dataclasses.asdict(config))


@pytest.mark.parametrize("config", SCHEDULES)
def test_betas_are_the_same_bits(config: ScheduleConfig) -> None:
    assert torch.equal(betas(config), published(config).betas)
    assert torch.equal(alphas_cumprod(config), published(config).alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 99])
@pytest.mark.parametrize("config", SCHEDULES)
def test_timesteps(config: ScheduleConfig, steps: int) -> None:
    scheduler = published(config)
    scheduler.set_timesteps(steps)
    assert timesteps(config, steps) == scheduler.timesteps.tolist()


def test_every_number_of_steps_falls_within_the_schedule() -> None:
    """Rounding in "trailing" spacing yields one timestep too many for some numbers, -1 among them."""
    for config in SCHEDULES[2:5]:
        for steps in range(1, 1000):
            times = timesteps(config, steps)
            assert len(times) == steps
            assert times[0] < config.num_train_timesteps
            assert times[-1] >= 0
            assert all(a > b for a, b in zip(times, times[1:], strict=False))


@pytest.mark.parametrize("config", SCHEDULES)
def test_whole_runs(config: ScheduleConfig) -> None:
    """Every step of runs of several lengths: x0 and x_{t-1}, the network's output and the noise made up."""
    for steps in (1, 4, 50):
        scheduler = published(config)
        scheduler.set_timesteps(steps)
        x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
        for step in run_steps(config, steps):
            prediction = torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + step.index))
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(99 + step.index))
            theirs = scheduler.step(
                prediction, step.timestep, x, generator=torch.Generator().manual_seed(99 + step.index)
            )
            x0, x = ddpm.ddpm_step(x, prediction, noise, step, config)
            torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=0, atol=1e-6)
            torch.testing.assert_close(x, theirs.prev_sample, rtol=0, atol=1e-6)


def test_forward_process_and_v() -> None:
    scheduler = published(STABLEVSR_SCHEDULE)
    x0, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for t in (0, 500, 999):
        alpha_bar, time = alphas_cumprod(STABLEVSR_SCHEDULE)[t], torch.tensor([t, t])
        x, v = ddpm.add_noise(x0, noise, alpha_bar), ddpm.v_target(x0, noise, alpha_bar)
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise, time))
        torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, time))
        torch.testing.assert_close(ddpm.predict_x0(x, v, alpha_bar, "v_prediction"), x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_estimate_inverts_the_forward_process(prediction_type: str) -> None:
    x0, noise, alpha_bar = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), 0.3
    alpha_bar = torch.tensor(alpha_bar, dtype=torch.float64)
    prediction = {"epsilon": noise, "v_prediction": ddpm.v_target(x0, noise, alpha_bar), "sample": x0}[prediction_type]
    x = ddpm.add_noise(x0, noise, alpha_bar)
    torch.testing.assert_close(ddpm.predict_x0(x, prediction, alpha_bar, prediction_type), x0)


def test_last_step_still_adds_a_trace_of_noise() -> None:
    """t = 1 in the released schedule: the posterior has no width, the reference's clamp leaves 1e-10."""
    step = run_steps(STABLEVSR_SCHEDULE, 50)[-1]
    assert step.timestep == 1
    _, variance = ddpm.posterior(torch.zeros(1), torch.zeros(1), step.alpha_bar, step.alpha_bar_next)
    assert variance.sqrt().item() == pytest.approx(1e-10)


@pytest.mark.parametrize("steps", [0, 1001])
def test_refuses_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(UserError, match=f"got {steps} steps, expected 1 to 1000"):
        timesteps(STABLEVSR_SCHEDULE, steps)


def test_refuses_an_offset_beyond_the_schedule() -> None:
    with pytest.raises(UserError, match="start at timestep 1000"):
        timesteps(STABLEVSR_SCHEDULE, 1000)


def test_refuses_an_unknown_prediction_type_by_name() -> None:
    with pytest.raises(UserError, match="prediction_type 'flow' is not supported"):
        ScheduleConfig(prediction_type="flow")


def made_up(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("config", [SCHEDULES[0], SCHEDULES[2], SCHEDULES[5]])
def test_ddim(config: ScheduleConfig, eta: float) -> None:
    """Whole runs against diffusers; its timesteps are ours for "leading" spacing."""
    scheduler = DDIMScheduler(**dataclasses.asdict(config))
    for steps in (1, 5, 50):
        scheduler.set_timesteps(steps)
        x = made_up((4, 5, 6), 1)
        for step in run_steps(config, steps):
            assert step.timestep == scheduler.timesteps[step.index]
            prediction, noise = made_up(x.shape, 10 + step.index), made_up(x.shape, 99 + step.index)
            theirs = scheduler.step(prediction, step.timestep, x, eta=eta, variance_noise=noise)
            x0, x = ddim_step(x, prediction, noise, step, config, eta=eta)
            torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=0, atol=1e-6)
            torch.testing.assert_close(x, theirs.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SCHEDULES[0], SCHEDULES[3]])
def test_dpm_solver(config: ScheduleConfig) -> None:
    """Whole runs against diffusers, on our timesteps."""
    for steps in (1, 2, 5, 20):
        ours = run_steps(config, steps)
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule=config.beta_schedule,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            prediction_type=config.prediction_type,
            final_sigmas_type="zero",
            lower_order_final=False,
        )
        scheduler.set_timesteps(timesteps=[step.timestep for step in ours])
        x, before = made_up((4, 5, 6), 1), None
        for step in ours:
            prediction = made_up(x.shape, 10 + step.index)
            theirs = scheduler.step(prediction, step.timestep, x).prev_sample
            before, x = dpm_solver_step(
                x, prediction, torch.zeros(()), step, dataclasses.replace(config, clip_sample=False), before
            )
            torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-5)


def test_a_perfect_network_needs_no_more_than_one_step() -> None:
    """Every sampler ends at the latent that the network sees behind the noise."""
    truth, noise = made_up((4, 5, 6), 0), made_up((4, 5, 6), 1)
    for name in SAMPLERS:
        for steps in (1, 7):
            x, before = noise, None
            for step in run_steps(STABLEVSR_SCHEDULE, steps):
                seen = (x - step.alpha_bar**0.5 * truth) / (1 - step.alpha_bar) ** 0.5
                prediction = ddpm.v_target(truth, seen, step.alpha_bar)
                before, x = sampler_by_name(name).step(x, prediction, noise, step, STABLEVSR_SCHEDULE, before)
            torch.testing.assert_close(x, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_step_in_use_is_the_papers(prediction_type: str) -> None:
    """In float64, at every step of a run: the form through x0 against the one with the predicted noise."""
    config = dataclasses.replace(STABLEVSR_SCHEDULE, prediction_type=prediction_type)
    for step in run_steps(config, 20):
        bars = {name: getattr(step, name).double() for name in ("alpha_bar", "alpha_bar_next")}
        x, noise, z = torch.randn(3, 4, 5, 6, dtype=torch.float64)
        x0 = (x - (1 - bars["alpha_bar"]) ** 0.5 * noise) / bars["alpha_bar"] ** 0.5
        outputs = {"epsilon": noise, "v_prediction": ddpm.v_target(x0, noise, bars["alpha_bar"]), "sample": x0}
        found_x0, found = ddpm.ddpm_step(x, outputs[prediction_type], z, dataclasses.replace(step, **bars), config)
        torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)
        expected = ddpm.paper_step(x, noise, z, **bars)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
