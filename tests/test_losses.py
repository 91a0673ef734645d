"""Training losses: the TCM's against the published training step, written with the libraries' modules."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from models import TINY, random_model, with_noise_levels
from references import library_twin
from torch import Tensor, nn

from stablevsr.architectures import RAFT_SMALL, STABLEVSR_SCHEDULE
from stablevsr.convert import keys
from stablevsr.model import StableVSR
from stablevsr.nn.raft import RAFT
from stablevsr.sampling.ddpm import add_noise
from stablevsr.training.losses import (
    Draws,
    alpha_bar_at,
    autoencoder_loss,
    denoiser_loss,
    flow_loss,
    noised_low_res,
    ssim,
    tcm_loss,
)


def draw(n: int, shape: tuple[int, ...], timestep: Tensor, seed: int) -> Draws:
    generator = torch.Generator().manual_seed(seed)
    return Draws(timestep, *(torch.randn(n, *shape, generator=generator) for _ in range(2)))


def published_step(model: StableVSR, batch: dict[str, Tensor], draws: Draws, other: Draws) -> tuple[Tensor, nn.Module]:
    """The public train.py, with its modules: diffusers' UNet, ControlNet, VAE, scheduler, and torchvision's RAFT."""
    unet, vae = library_twin(model.unet, TINY.unet), library_twin(model.vae, TINY.vae)
    controlnet, raft = library_twin(model.tcm, TINY.tcm), library_twin(model.flow, RAFT_SMALL)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
    scaling = vae.config.scaling_factor
    context, time = batch["context"], draws.timestep

    def encode(picture: Tensor, noise: Tensor) -> Tensor:
        posterior = vae.encode(picture).latent_dist
        return (posterior.mean + posterior.std * noise) * scaling

    with torch.no_grad():
        latent = encode(batch["neighbour"], other.posterior)
        noisy = scheduler.add_noise(latent, other.noise, time)
        v = unet(torch.cat([noisy, batch["neighbour_low_res"]], 1), time, context).sample
        alpha = scheduler.alphas_cumprod[time][:, None, None, None]
        x0 = alpha**0.5 * noisy - (1 - alpha) ** 0.5 * v
        picture = vae.decode(x0 / scaling).sample
        up = [F.interpolate(batch[k], scale_factor=4, mode="bicubic") for k in ("low_res", "neighbour_low_res")]
        flow = raft(*up)[-1]
        h, w = flow.shape[2:]
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([x, y], -1)[None] + flow.permute(0, 2, 3, 1)
        grid = 2 * grid / torch.tensor([w - 1, h - 1]) - 1
        guidance = F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        latent = encode(batch["frame"], draws.posterior)
    noisy = torch.cat([scheduler.add_noise(latent, draws.noise, time), batch["low_res"]], 1)
    down, mid = controlnet(noisy, time, context, guidance, return_dict=False)
    prediction = unet(
        noisy, time, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    return F.mse_loss(prediction, scheduler.get_velocity(latent, draws.noise, time)), controlnet


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"frame": (2, 3, 128, 136), "neighbour": (2, 3, 128, 136), "context": (2, 77, 32)}
    shapes |= {"low_res": (2, 3, 32, 34), "neighbour_low_res": (2, 3, 32, 34)}
    return {name: torch.rand(shape, generator=generator) * 2 - 1 for name, shape in shapes.items()}


def test_tcm_step_equals_the_published_one(batch: dict[str, Tensor]) -> None:
    model = random_model(seed=3)
    model.tcm.requires_grad_(True)
    timestep = torch.tensor([20, 700])
    draws, other = (draw(2, (4, 32, 34), timestep, seed) for seed in (1, 2))
    theirs, controlnet = published_step(model, batch, draws, other)
    theirs.backward()
    ours = tcm_loss(model, **batch, draws=draws, neighbour_draws=other)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    published = dict(controlnet.named_parameters())
    for name, parameter in model.tcm.named_parameters():
        expected = published[keys.rename(name, keys.DIFFUSERS_TCM)].grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name
    for part in (model.unet, model.vae, model.flow):
        assert all(parameter.grad is None for parameter in part.parameters())


def test_tcm_needs_one_timestep_for_both(batch: dict[str, Tensor]) -> None:
    a, b = (draw(2, (4, 32, 34), torch.tensor([t, t]), 0) for t in (3, 4))
    with pytest.raises(AssertionError, match="share the timestep"):
        tcm_loss(random_model(), **batch, draws=a, neighbour_draws=b)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_has_no_denoising_loss(prediction_type: str) -> None:
    """A network that knows the latent answers each prediction type from the forward process: the loss is zero."""
    schedule = replace(STABLEVSR_SCHEDULE, prediction_type=prediction_type)
    latent, low_res = torch.randn(3, 4, 5, 6), torch.randn(3, 3, 5, 6)
    draws = draw(3, (4, 5, 6), torch.tensor([1, 500, 990]), 0)

    def oracle(x: Tensor, timestep: Tensor, context: Tensor, noise_level: Tensor | None) -> Tensor:
        assert torch.equal(x[:, 4:], low_res)
        alpha_bar = alpha_bar_at(schedule, timestep)
        noise = (x[:, :4] - alpha_bar**0.5 * latent) / (1 - alpha_bar) ** 0.5
        v = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * latent
        return {"epsilon": noise, "v_prediction": v, "sample": latent}[prediction_type]

    assert denoiser_loss(oracle, latent, low_res, None, draws, schedule) < 1e-5
    wrong = replace(schedule, prediction_type="epsilon" if prediction_type != "epsilon" else "sample")
    assert denoiser_loss(oracle, latent, low_res, None, draws, wrong) > 0.1


def test_low_res_is_noised_for_models_that_embed_the_level() -> None:
    model = random_model(with_noise_levels(TINY))
    low_res, noise = torch.rand(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    plain = draw(2, (4, 5, 6), torch.tensor([1, 2]), 0)
    assert noised_low_res(model, low_res, plain) is low_res
    levels = replace(plain, noise_level=torch.tensor([0, 300]), low_res_noise=noise)
    expected = add_noise(low_res, noise, alpha_bar_at(model.config.low_res_schedule, torch.tensor([0, 300])))
    assert torch.equal(noised_low_res(model, low_res, levels), expected)


def test_autoencoder_loss_trains_a_tiny_autoencoder() -> None:
    vae = random_model().vae.requires_grad_(True)
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3)
    losses = []
    for _ in range(30):
        loss = autoencoder_loss(vae, picture, 0.03 * torch.randn(2, 4, 4, 4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_ssim_is_one_for_equal_pictures_and_less_otherwise() -> None:
    picture = torch.rand(1, 3, 20, 20) * 2 - 1
    assert ssim(picture, picture).item() == pytest.approx(1)
    assert ssim(picture, picture.flip(-1)).item() < 0.5


def test_flow_loss_weighs_later_predictions_more_and_skips_invalid_pixels() -> None:
    class Fixed(RAFT):
        def __init__(self, predictions: list[Tensor]) -> None:
            nn.Module.__init__(self)
            self.fixed = predictions

        def predictions(self, picture1: Tensor, picture2: Tensor) -> list[Tensor]:
            return self.fixed

    flow, valid = torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    off_by = [torch.full_like(flow, error) for error in (1.0, 3.0)]
    assert flow_loss(Fixed(off_by), None, None, flow, valid).item() == pytest.approx(3.0 + 0.8 * 1.0)
    off_by[1][..., 0] = 100
    valid[..., 0] = False
    assert flow_loss(Fixed(off_by), None, None, flow, valid).item() == pytest.approx(3.8)
    assert flow_loss(Fixed(off_by), None, None, flow, ~valid | True).item() > 20
