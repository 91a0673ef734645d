"""Rollout distillation: a full few-step DDIM run with gradients through all steps, and losses on its result.

In training the network sees what it sees at inference: its own latents, starting from pure noise, at the timesteps of
the run. That is why few steps suffice (Stream-DiffVSR trains its UNet and TCM this way).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.nn.tiny import TemporalTinyVAE
from stablevsr.nn.vae import VAE
from stablevsr.nn.warp import warp, warp_published
from stablevsr.sampling.bidirectional import pass_order
from stablevsr.sampling.color_fix import correction
from stablevsr.sampling.flow import estimate_flow
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.samplers import ddim_step
from stablevsr.sampling.schedule import Step
from stablevsr.sampling.streaming import stream_steps
from stablevsr.training.features import feature_distance
from stablevsr.training.losses import autoencoder_of, flow_network_of, tiny_decoder_of
from stablevsr.training.recipe import RolloutRecipe

Motion = tuple[Tensor, Tensor]  # flow and valid of `temporal_loss`


@dataclass(frozen=True)
class Objective:
    """The run to distil and the losses on its result."""

    recipe: RolloutRecipe
    features: nn.Module | None  # a `FeatureNetwork`, or None if its weight is 0
    teacher: VAE | None = None  # stage stream-vae: spans the latent space

    def steps(self, model: Networks) -> list[Step]:
        return stream_steps(model.config.schedule, self.recipe.steps)


def denoise(
    model: Networks,
    x: Tensor,
    low_res: Tensor,
    context: Tensor,
    step: Step,
    condition: Tensor | None,
    embedding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step on a batch (n, c, h, w): returns x0 and the latent at the next timestep.

    Without `condition`, and without its `embedding` where several steps share one, the TCM does not run.
    """
    network_input = torch.cat([x, low_res], dim=1)
    timestep = torch.full((len(x),), step.timestep, device=x.device)
    residuals = None
    if condition is not None or embedding is not None:
        residuals = model.tcm(network_input, timestep, context, condition, embedding=embedding)
    prediction = model.unet(network_input, timestep, context, None, residuals).float()
    return ddim_step(x, prediction, torch.zeros_like(x), step, model.config.schedule)  # eta is 0: no noise needed


def roll_out(model: Networks, low_res: Tensor, noise: Tensor, context: Tensor, steps: list[Step]) -> Tensor:
    """Run all steps on single images with the UNet alone.

    Args:
        low_res: (n, 3, h, w) in [-1, 1].
        noise: (n, latent channels, h, w), unit Gaussian.
        context: (n, tokens, width).

    Returns:
        The clean latents (n, latent channels, h, w), scaled.
    """
    x0 = x = noise
    for step in steps:
        x0, x = denoise(model, x, low_res, context, step, None)
    return x0


def roll_out_clips(model: Networks, low_res: Tensor, noise: Tensor, context: Tensor, steps: list[Step]) -> Tensor:
    """Run all steps on short clips with the TCM, in the frame order of `bidirectional_sampling`.

    Gradients flow through the steps of a frame but not between frames: the guidance is detached.

    Args:
        low_res: (n, frames, 3, h, w) in [-1, 1].
        noise: (n, frames, latent channels, h, w), unit Gaussian.
        context: (n, tokens, width).

    Returns:
        The clean latents (n, frames, latent channels, h, w), scaled.
    """
    count = low_res.shape[1]
    flows = _flows(model, low_res)
    x, estimates, x0 = list(noise.unbind(1)), [noise[:, 0]] * count, noise[:, 0]
    for step in steps:
        order = pass_order(step.index, count)
        for position, frame in enumerate(order):
            condition = None if position == 0 else _guidance(model, x0, flows[frame, order[position - 1]])
            x0, x[frame] = denoise(model, x[frame], low_res[:, frame], context, step, condition)
            estimates[frame] = x0
    return torch.stack(estimates, dim=1)


@torch.no_grad()
def _flows(model: Networks, low_res: Tensor) -> dict[tuple[int, int], Tensor]:
    """Flows between neighbouring frames of clips (n, frames, 3, h, w): (n, 2, 4h, 4w) by (target, source)."""
    pairs = [pair for i in range(low_res.shape[1] - 1) for pair in ((i + 1, i), (i, i + 1))]
    with torch.autocast(low_res.device.type, enabled=False):  # half precision rounds coordinates by whole pixels
        return {
            (target, source): estimate_flow(flow_network_of(model), low_res[:, target], low_res[:, source])
            for target, source in pairs
        }


@torch.no_grad()
def _guidance(model: Networks, x0: Tensor, flow: Tensor) -> Tensor:
    """The neighbour's x0 (n, c, h, w), decoded as in sampling and warped to the current frame: (n, 3, 4h, 4w)."""
    vae = autoencoder_of(model)
    picture = tiny_decoder_of(model)(x0) if model.sampling.temporal.tiny else vae.decode(x0 / vae.scaling_factor)
    with torch.autocast(x0.device.type, enabled=False):
        return warp_published(picture.float(), flow)


@torch.no_grad()
def latent_of(vae: VAE | TemporalTinyVAE, picture: Tensor) -> Tensor:
    """The scaled latent (n, latent channels, h, w) of pictures (n, 3, 4h, 4w) in [-1, 1]."""
    return (
        vae.encode(picture).mean.float() * vae.scaling_factor if isinstance(vae, VAE) else vae.encode(picture).float()
    )


def pictures_loss(
    pictures: Tensor, truth: Tensor, objective: Objective, motion: Motion | None = None, first: int = 0
) -> Tensor:
    """L1 and feature distance of the frames from `first` on, and the temporal losses of all, weighted by the recipe.

    Args:
        pictures: (n, frames, 3, h, w), decoded, about [-1, 1].
        truth: (n, frames, 3, h, w) in [-1, 1].
        motion: None without ground-truth flow, and then without `temporal_loss`.
    """
    weights = objective.recipe
    loss = weights.picture * F.l1_loss(pictures[:, first:], truth[:, first:]) / 2
    if objective.features is not None:
        with torch.no_grad():
            target = objective.features(truth.flatten(0, 1) / 2 + 0.5)
        ours = objective.features(pictures.flatten(0, 1) / 2 + 0.5)
        loss = loss + weights.features * feature_distance(ours, target).view(truth.shape[:2])[:, first:].mean()
        if weights.feature_changes:
            changes = [_changes(features, *truth.shape[:2]) for features in (ours, target)]
            loss = loss + weights.feature_changes * (changes[0] - changes[1]).abs().mean()
    if motion is not None:
        loss = loss + weights.temporal * temporal_loss(pictures, truth, *motion)
    return loss


def _changes(features: list[Tensor], count: int, frames: int) -> Tensor:
    """Feature distance between neighbouring frames of flattened clips: (count * (frames - 1),)."""
    clips = [each.unflatten(0, (count, frames)) for each in features]
    return feature_distance(
        [each[:, 1:].flatten(0, 1) for each in clips], [each[:, :-1].flatten(0, 1) for each in clips]
    )


def temporal_loss(picture: Tensor, truth: Tensor, flow: Tensor, valid: Tensor) -> Tensor:
    """L1 between the changes of result and ground truth along the true flow, where the flow is valid.

    Resampling and lighting change both alike and cancel out, so only flicker is left.

    Args:
        picture, truth: (n, frames, 3, h, w), roughly in [-1, 1].
        flow: (n, frames - 1, 2, h, w) in pixels, which warps frame i onto the grid of frame i + 1.
        valid: (n, frames - 1, h, w) booleans.
    """
    error = picture - truth  # warping is linear: the difference of changes is the change of the error
    source, target = error[:, :-1].flatten(0, 1), error[:, 1:].flatten(0, 1)
    weight = valid.flatten(0, 1)[:, None].to(error.dtype)
    change = (target - warp(source, flow.flatten(0, 1))).abs() * weight
    return change.sum() / (3 * weight.sum()).clamp(min=1) / 2


def _latent_loss(model: Networks, x0: Tensor, truth: Tensor, objective: Objective) -> Tensor:
    return objective.recipe.latent * F.mse_loss(x0, latent_of(model.vae, truth))


def with_color_fix(model: Networks, picture: Tensor, low_res: Tensor) -> Tensor:
    """Decoded frames (n, 3, 4h, 4w) with the color fix that the weights sample with; sampling clamps before and after.

    Args:
        low_res: (n, 3, h, w) in [-1, 1].
    """
    kind = model.sampling.color_fix
    return picture if kind is None else picture + correction(picture, low_res, kind)


def rollout_loss(
    model: Networks, truth: Tensor, low_res: Tensor, noise: Tensor, context: Tensor, objective: Objective
) -> Tensor:
    """Rollout loss of the UNet and the VAE's decoder, whichever have gradients, on single images.

    Args:
        truth: (n, 3, 4h, 4w) in [-1, 1].
        low_res: (n, 3, h, w) in [-1, 1].
        noise: (n, latent channels, h, w).
        context: (n, tokens, width).
    """
    x0 = roll_out(model, low_res, noise, context, objective.steps(model))
    picture = with_color_fix(model, model.vae.decode(x0 / model.vae.scaling_factor).float(), low_res)
    return _latent_loss(model, x0, truth, objective) + pictures_loss(picture[:, None], truth[:, None], objective)


def tcm_rollout_loss(
    model: Networks,
    truth: Tensor,
    low_res: Tensor,
    noise: Tensor,
    context: Tensor,
    objective: Objective,
    motion: Motion | None,
) -> Tensor:
    """Rollout loss of the TCM on short clips.

    Args:
        truth: (n, frames, 3, 4h, 4w) in [-1, 1].
        low_res: (n, frames, 3, h, w) in [-1, 1].
        noise: (n, frames, latent channels, h, w).
        context: (n, tokens, width).
        motion: None without ground-truth flow.
    """
    x0 = roll_out_clips(model, low_res, noise, context, objective.steps(model)).flatten(0, 1)
    picture = model.vae.decode(x0 / model.vae.scaling_factor).float()
    picture = with_color_fix(model, picture, low_res.flatten(0, 1))
    latent = _latent_loss(model, x0, truth.flatten(0, 1), objective)
    return latent + pictures_loss(picture.view_as(truth), truth, objective, motion)
