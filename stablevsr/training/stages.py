"""The loss of each training stage on a batch, with random draws that are functions of (seed, step, process)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stablevsr.model import StableVSR
from stablevsr.nn.vae import VAE
from stablevsr.sampling.pictures import bicubic
from stablevsr.training.data import Window
from stablevsr.training.features import load_features
from stablevsr.training.losses import (
    Draws,
    autoencoder_loss,
    autoencoder_of,
    denoiser_loss,
    encode_latent,
    flow_loss,
    flow_network_of,
    noised_low_res,
    tcm_loss,
    tiny_decoder_loss,
)
from stablevsr.training.recipe import Recipe
from stablevsr.training.rollout import Objective, rollout_loss, tcm_rollout_loss
from stablevsr.training.stream_rollout import stream_tcm_loss, stream_vae_loss

LATENT_NOISE = 0.03  # standard deviation in stage vae; latents have unit variance


class Randomness:
    """Random draws that depend only on the seed and `place`; made on the CPU, so they are equal on every device."""

    def __init__(self, seed: int, *place: int) -> None:
        key = int(np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)[0])
        self.generator = torch.Generator().manual_seed(key)

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(device)

    def integers(self, high: int, *shape: int, device: torch.device) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(device)


def _draws(model: StableVSR, low_res: Tensor, random: Randomness, like: Draws | None = None) -> Draws:
    """Draws for LR frames (n, 3, h, w); timestep and noise level are taken from `like` if given."""
    n, _, h, w = low_res.shape
    device, shape = low_res.device, (n, model.config.vae.latent_channels, h, w)
    timestep = like.timestep if like else random.integers(model.config.schedule.num_train_timesteps, n, device=device)
    draws = Draws(timestep, random.normal(*shape, device=device), random.normal(*shape, device=device))
    if model.config.low_res_schedule is None:
        return draws
    level = like.noise_level if like else random.integers(model.config.max_noise_level + 1, n, device=device)
    return replace(draws, noise_level=level, low_res_noise=random.normal(n, 3, h, w, device=device))


def _context(model: StableVSR, count: int) -> Tensor:
    return model.empty_prompt[None].expand(count, -1, -1)


def vae_stage(model: StableVSR, window: Window, random: Randomness) -> Tensor:
    """The autoencoder on the first frames."""
    picture, low_res = window["hr"][:, 0], window["lr"][:, 0]
    shape = (len(picture), model.config.vae.latent_channels, *low_res.shape[-2:])
    noise = LATENT_NOISE * random.normal(*shape, device=picture.device)
    return autoencoder_loss(autoencoder_of(model), picture, noise)


def unet_stage(model: StableVSR, window: Window, random: Randomness) -> Tensor:
    """The base model on the first frames: image super-resolution."""
    picture, low_res = window["hr"][:, 0], window["lr"][:, 0]
    draws = _draws(model, low_res, random)
    with torch.no_grad():
        latent = encode_latent(autoencoder_of(model), picture, draws.posterior)
    condition = noised_low_res(model, low_res, draws)
    return denoiser_loss(model.unet, latent, condition, _context(model, len(picture)), draws, model.config.schedule)


def flow_stage(model: StableVSR, window: Window, random: Randomness) -> Tensor:
    """RAFT on its input at inference: LR frames upscaled by bicubic interpolation."""
    source, target = (bicubic(window["lr"][:, i]) for i in (0, 1))
    return flow_loss(flow_network_of(model), target, source, window["flow"][:, 0], window["valid"][:, 0])


def tcm_stage(model: StableVSR, window: Window, random: Randomness) -> Tensor:
    """The TCM on the centre frames and, at random, the frames before or after."""
    hr, low_res = window["hr"], window["lr"]
    rows = torch.arange(len(hr), device=hr.device)
    side = 2 * random.integers(2, len(hr), device=hr.device)  # 0 or 2 of three frames
    draws = _draws(model, low_res[:, 1], random)
    return tcm_loss(
        model,
        frame=hr[:, 1],
        neighbour=hr[rows, side],
        low_res=low_res[:, 1],
        neighbour_low_res=low_res[rows, side],
        context=_context(model, len(hr)),
        draws=draws,
        neighbour_draws=_draws(model, low_res[:, 1], random, like=draws),
    )


def tiny_stage(model: StableVSR, window: Window, random: Randomness) -> Tensor:
    """The tiny decoder on the first frames, distilled from the VAE decoder."""
    picture, low_res = window["hr"][:, 0], window["lr"][:, 0]
    draws = _draws(model, low_res, random)
    return tiny_decoder_loss(model, picture, draws, low_res, _context(model, len(picture)))


def rollout_stage(model: StableVSR, window: Window, random: Randomness, objective: Objective) -> Tensor:
    """The UNet, the VAE's decoder, or both, on the first frames, through all steps of the distilled run."""
    picture, low_res = window["hr"][:, 0], window["lr"][:, 0]
    noise = random.normal(len(picture), model.config.vae.latent_channels, *low_res.shape[-2:], device=picture.device)
    return rollout_loss(model, picture, low_res, noise, _context(model, len(picture)), objective)


def clip_stage(
    model: StableVSR, window: Window, random: Randomness, objective: Objective, loss: Callable[..., Tensor]
) -> Tensor:
    """A rollout `loss` on whole windows, through all steps of the distilled run."""
    picture, low_res = window["hr"], window["lr"]
    shape = (*picture.shape[:2], model.config.vae.latent_channels, *low_res.shape[-2:])
    noise = random.normal(*shape, device=picture.device)
    motion = (window["flow"], window["valid"]) if "flow" in window else None
    return loss(model, picture, low_res, noise, _context(model, len(picture)), objective, motion)


class Stage(NamedTuple):
    """Which parts of the model are trained, and how."""

    parts: tuple[str, ...]
    num_frames: int  # per window
    needs_flow: bool
    loss: Callable[..., Tensor]  # (model, window, randomness), and objective if `is_rollout`
    is_rollout: bool = False
    is_streaming: bool = False  # for streaming weights, and only for them


STAGES = {
    "vae": Stage(("vae",), 1, False, vae_stage),
    "unet": Stage(("unet",), 1, False, unet_stage),
    "flow": Stage(("flow",), 2, True, flow_stage),
    "tcm": Stage(("tcm",), 3, False, tcm_stage),
    "tiny": Stage(("tiny",), 1, False, tiny_stage),
    "rollout": Stage(("unet",), 1, False, rollout_stage, is_rollout=True),
    "vae-rollout": Stage(("vae",), 1, False, rollout_stage, is_rollout=True),
    "joint-rollout": Stage(("unet", "vae"), 1, False, rollout_stage, is_rollout=True),
    "tcm-rollout": Stage(("tcm",), 3, True, partial(clip_stage, loss=tcm_rollout_loss), is_rollout=True),
    "stream-vae": Stage(("vae",), 2, True, partial(clip_stage, loss=stream_vae_loss), True, True),
    "stream-tcm": Stage(("tcm",), 3, True, partial(clip_stage, loss=stream_tcm_loss), True, True),
}
TRAINED = tuple(dict.fromkeys(part for stage in STAGES.values() for part in stage.parts))  # parts that can be trained


def stage_of(recipe: Recipe, device: torch.device, teacher: VAE | None = None) -> Stage:
    """The recipe's stage, with its objective bound; `teacher` is the VAE of the recipe's teacher.

    Raises:
        UserError: if the objective needs feature weights that are not installed.
    """
    stage = STAGES[recipe.stage]
    if not stage.is_rollout:
        return stage
    seen = recipe.rollout.features or recipe.rollout.feature_changes
    features = load_features("lite0").to(device) if seen else None
    return stage._replace(
        needs_flow=stage.needs_flow and recipe.rollout.temporal > 0,
        loss=partial(stage.loss, objective=Objective(recipe.rollout, features, teacher)),
    )


class StageLoss(nn.Module):
    """A stage's loss as a module, as DistributedDataParallel needs; only the stage's parts are trainable."""

    def __init__(self, model: StableVSR, stage: Stage) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.stage = stage
        self.learner = nn.ModuleDict({part: getattr(model, part) for part in stage.parts})
        self.learner.requires_grad_(True)

    def forward(self, window: Window, random: Randomness) -> Tensor:
        return self.stage.loss(self.model, window, random)
