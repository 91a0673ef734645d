"""Rollout distillation: the run that is trained is the run that is sampled, and what its losses ask for."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, random_model, with_noise_levels
from torch import Tensor

from stablevsr import SamplingConfig, TemporalGuidance, build_model, sample_video
from stablevsr.architectures import ARCHITECTURES
from stablevsr.errors import UserError
from stablevsr.model import StableVSR
from stablevsr.nn.warp import pixel_grid, warp
from stablevsr.sampling.color_fix import correction
from stablevsr.sampling.schedule import run_steps
from stablevsr.training.recipe import RolloutRecipe, read_recipe
from stablevsr.training.rollout import (
    Objective,
    pictures_loss,
    roll_out,
    roll_out_clips,
    rollout_loss,
    tcm_rollout_loss,
    temporal_loss,
)
from stablevsr.training.train import for_rollout, starting_model, train
from stablevsr.weights import Header, write

STEPS = 3
RECIPE = """
stage = "tcm-rollout"
preset = "tiny"
output = "run"
steps = 1
batch = 1
[data]
crop = 32
{data}
[rollout]
steps = 3
features = 0.0
temporal = {temporal}
"""


@pytest.fixture
def model() -> StableVSR:
    return random_model(replace(TINY, schedule=replace(TINY.schedule, timestep_spacing="trailing")))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Given:
    """Noise from a tensor (frames, c, h, w)."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def initial(self, frame: int) -> Tensor:
        return self.noise[frame]

    def step(self, index: int, frame: int) -> Tensor:
        return torch.zeros_like(self.noise[frame])


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_run_that_is_trained_is_the_run_that_is_sampled(model: StableVSR, frames: int, tiny: bool) -> None:
    model.sampling = SamplingConfig(steps=STEPS, sampler="ddim", scene_cuts="off", temporal=TemporalGuidance(tiny=tiny))
    low_res, noise = torch.rand(2, frames, 3, 10, 12, generator=torch.Generator().manual_seed(0)), None
    noise = normal(2, frames, 4, 10, 12)
    context, steps = model.encode_prompt(None).expand(2, -1, -1), run_steps(model.config.schedule, STEPS)
    if frames == 1:
        x0 = roll_out(model, low_res[:, 0] * 2 - 1, noise[:, 0], context, steps)[:, None]
    else:
        x0 = roll_out_clips(model, low_res * 2 - 1, noise, context, steps)
    for number in range(2):
        ours = (model.vae.decode(x0[number] / model.vae.scaling_factor) / 2 + 0.5).clamp(0, 1)
        theirs = sample_video(model, low_res[number], noise=Given(noise[number]))
        assert (ours - theirs).abs().max() < 2e-3
        assert theirs.std() > 0.05


def test_gradients_run_through_every_step(model: StableVSR) -> None:
    """Cut between the steps, the first ones would not matter to the loss."""
    low_res, noise = normal(1, 3, 8, 8), normal(1, 4, 8, 8, seed=1).requires_grad_()
    steps = run_steps(model.config.schedule, STEPS)
    roll_out(model, low_res, noise, model.encode_prompt(None), steps).square().mean().backward()
    assert noise.grad.abs().max() > 1e-6
    clip, noise = normal(1, 2, 3, 8, 8), normal(1, 2, 4, 8, 8, seed=1).requires_grad_()
    roll_out_clips(model, clip, noise, model.encode_prompt(None), steps)[:, 1].square().mean().backward()
    assert noise.grad[:, 1].abs().max() > 1e-6
    assert noise.grad[:, 0].abs().max() == 0  # guidance is given, not taught through


def test_the_loss_falls_when_the_unet_learns(model: StableVSR) -> None:
    model.unet.requires_grad_(True)
    objective = Objective(RolloutRecipe(steps=2, latent=1.0, picture=2.0, features=0.0), None)
    optimiser = torch.optim.Adam(model.unet.parameters(), lr=1e-3)
    truth, low_res, noise = normal(1, 3, 32, 32).clamp(-1, 1), normal(1, 3, 8, 8), normal(1, 4, 8, 8)
    losses = []
    for _ in range(8):
        loss = rollout_loss(model, truth, low_res, noise, model.encode_prompt(None), objective)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_each_weight_adds_its_own_term(model: StableVSR) -> None:
    truth, pictures = normal(2, 2, 3, 32, 32).clamp(-1, 1), torch.zeros(2, 2, 3, 32, 32)

    def features(x: Tensor) -> list[Tensor]:
        return [x]

    def loss(**weights: float) -> float:
        recipe = RolloutRecipe(**{"picture": 0.0, "features": 0.0, **weights})
        return pictures_loss(pictures, truth, Objective(recipe, features)).item()

    assert loss(picture=3.0) == pytest.approx(1.5 * truth.abs().mean().item(), rel=1e-5)  # in [0, 1]
    distance = (truth / 2).square().sum(2).mean().item()
    assert loss(features=1.0, picture=3.0) == pytest.approx(distance + loss(picture=3.0), rel=1e-5)
    changes = (truth / 2).diff(dim=1).square().sum(2).mean().item()  # the pictures do not change
    assert loss(features=1.0, feature_changes=2.0) == pytest.approx(distance + 2 * changes, rel=1e-5)


def test_the_latent_term_is_of_the_scaled_latent(model: StableVSR) -> None:
    truth, low_res, noise = normal(1, 3, 32, 32).clamp(-1, 1), normal(1, 3, 8, 8), normal(1, 4, 8, 8)
    objective, context = (
        Objective(RolloutRecipe(steps=2, latent=2.0, picture=0.0, features=0.0), None),
        model.encode_prompt(None),
    )
    x0 = roll_out(model, low_res, noise, context, objective.steps(model))
    expected = 2 * (x0 - model.vae.encode(truth).mean * model.vae.scaling_factor).square().mean()
    assert rollout_loss(model, truth, low_res, noise, context, objective).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_the_temporal_loss_is_of_what_flickers() -> None:
    """None for an error that moves with the picture; L1 of the flicker where the flow holds."""
    flow = torch.full((1, 1, 2, 16, 16), 2.0)
    frame = normal(1, 3, 16, 16)
    moved = warp(frame, flow[:, 0])
    truth = torch.zeros(1, 2, 3, 16, 16)
    valid = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    error = torch.stack([frame, moved], dim=1)
    assert temporal_loss(truth + error, truth, flow, valid) == 0
    error[:, 1, :, 4:8] += 0.5
    assert temporal_loss(truth + error, truth, flow, valid).item() == pytest.approx(0.25 * 4 / 16)
    valid[..., 4:8, :] = False
    assert temporal_loss(truth + error, truth, flow, valid) == 0
    assert temporal_loss(truth + error, truth, flow, torch.zeros_like(valid)) == 0


def test_fetching_is_exact() -> None:
    picture = pixel_grid(torch.zeros(1, 2, 8, 10))  # the value of a pixel is its place
    flow = torch.tensor([1.25, -0.5])[:, None, None].expand(1, 2, 8, 10)
    inside = (..., slice(1, -1), slice(2, -2))
    assert torch.allclose(warp(picture, flow)[inside], (picture + flow)[inside], atol=1e-4)


def test_the_temporal_term_needs_a_flow_and_a_weight(model: StableVSR) -> None:
    truth, low_res, noise = normal(1, 2, 3, 32, 32).clamp(-1, 1), normal(1, 2, 3, 8, 8), normal(1, 2, 4, 8, 8)
    motion = torch.zeros(1, 1, 2, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)

    def loss(temporal: float, given: tuple[Tensor, Tensor] | None) -> float:
        objective = Objective(RolloutRecipe(steps=2, features=0.0, temporal=temporal), None)
        return tcm_rollout_loss(model, truth, low_res, noise, model.encode_prompt(None), objective, given).item()

    plain = loss(0.0, None)
    assert loss(0.0, motion) == loss(1.0, None) == plain
    assert loss(1.0, motion) > plain


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    path = tmp_path / "run.toml"
    path.write_text(RECIPE.format(data="side = 32\npool = 1", temporal=0.5))
    return path


def test_the_file_names_the_run_that_it_was_distilled_to(recipe: Path) -> None:
    model = build_model(train(recipe, torch.device("cpu")), device="cpu")
    assert (model.sampling.steps, model.sampling.sampler) == (3, "ddim")
    assert [step.timestep for step in run_steps(model.config.schedule, 3)] == [999, 666, 332]
    assert starting_model(read_recipe(recipe), recipe.parent)[1].config == model.config


def test_weights_that_were_sampled_with_another_spacing_get_the_rollouts() -> None:
    header = Header(TINY, sampling=SamplingConfig(spacing="leading", eta=0.5, sampler="ddim"))
    found = for_rollout(RolloutRecipe(steps=4), header)
    schedule = found.sampling.schedule_for(found.config)
    assert [step.timestep for step in run_steps(schedule, found.sampling.steps)] == [999, 749, 499, 249]
    assert found.sampling.eta == 0


def test_the_picture_is_corrected_by_the_color_fix_of_the_recipe(model: StableVSR) -> None:
    """Which becomes the default of the weights file."""
    found = for_rollout(RolloutRecipe(steps=2, color_fix="backprojection"), Header(TINY))
    assert found.sampling.color_fix == "backprojection"
    assert for_rollout(RolloutRecipe(), found).sampling.color_fix == "backprojection"
    assert for_rollout(RolloutRecipe(color_fix="none"), found).sampling.color_fix is None
    model.sampling = found.sampling
    truth, low_res, noise = normal(1, 3, 32, 32).clamp(-1, 1), normal(1, 3, 8, 8), normal(1, 4, 8, 8)
    objective = Objective(RolloutRecipe(steps=2, latent=0.0, picture=1.0, features=0.0), None)
    context = model.encode_prompt(None)
    x0 = roll_out(model, low_res, noise, context, objective.steps(model))
    picture = model.vae.decode(x0 / model.vae.scaling_factor) / 2 + 0.5
    fixed = picture + correction(picture, low_res / 2 + 0.5, "backprojection")
    expected = (fixed - truth / 2 - 0.5).abs().mean().item()
    assert rollout_loss(model, truth, low_res, noise, context, objective).item() == pytest.approx(expected, rel=1e-4)
    assert abs(expected - (picture - truth / 2 - 0.5).abs().mean().item()) > 0.01 * expected


def test_each_frame_of_a_clip_is_corrected_by_its_own_lr_frame(model: StableVSR) -> None:
    model.sampling = replace(model.sampling, color_fix="backprojection")
    truth, low_res, noise = normal(2, 2, 3, 32, 32).clamp(-1, 1), normal(2, 2, 3, 8, 8), normal(2, 2, 4, 8, 8)
    objective = Objective(RolloutRecipe(steps=2, latent=0.0, picture=2.0, features=0.0), None)
    context = model.encode_prompt(None).expand(2, -1, -1)
    x0 = roll_out_clips(model, low_res, noise, context, objective.steps(model))
    errors = []
    for clip, frame in product(range(2), repeat=2):
        picture = model.vae.decode(x0[clip, frame][None] / model.vae.scaling_factor)
        fixed = picture + correction(picture, low_res[clip, frame][None], "backprojection")
        errors.append((fixed - truth[clip, frame]).abs().mean().item())
    loss = tcm_rollout_loss(model, truth, low_res, noise, context, objective, None)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "sampling", "message"),
    [
        (with_noise_levels(TINY), SamplingConfig(), "has noise levels .* which stage tcm-rollout does not support"),
        (replace(TINY, tiny=None), SamplingConfig(temporal=TemporalGuidance(tiny=True)), "hold no tiny decoder"),
    ],
)
def test_weights_that_cannot_be_rolled_out_are_refused(recipe: Path, config, sampling, message: str) -> None:
    write(recipe.parent / "start.safetensors", Header(config, {}, sampling=sampling), random_model(config).state_dict())
    recipe.write_text(recipe.read_text().replace('preset = "tiny"', 'init = "start.safetensors"'))
    with pytest.raises(UserError, match=message):
        starting_model(read_recipe(recipe), recipe.parent)


def test_folders_have_no_flow_for_the_temporal_term(recipe: Path) -> None:
    folders = 'kind = "folders"\nroot = "."'
    recipe.write_text(RECIPE.format(data=folders, temporal=0.5))
    with pytest.raises(
        UserError, match=r"expected procedural or photos for stage tcm-rollout with rollout.temporal above 0"
    ):
        read_recipe(recipe)
    recipe.write_text(RECIPE.format(data=folders, temporal=0.0))
    assert read_recipe(recipe).data.kind == "folders"
