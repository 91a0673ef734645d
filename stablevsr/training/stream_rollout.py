"""Rollouts of streaming models: frame by frame, each guided by the previous finished frame, as at inference.

One run serves two stages (Stream-DiffVSR trains the same parts). `stream-vae` trains the temporal tiny autoencoder on
the latents that the frozen networks produce, `stream-tcm` the TCM through the frozen decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.nn.vae import VAE
from stablevsr.nn.warp import warp_published
from stablevsr.sampling.flow import estimate_flow
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.schedule import Step
from stablevsr.training.losses import flow_network_of, temporal_autoencoder_of
from stablevsr.training.rollout import Motion, Objective, denoise, latent_of, pictures_loss, with_color_fix


def roll_out_stream(
    model: Networks, low_res: Tensor, noise: Tensor, context: Tensor, steps: list[Step]
) -> tuple[Tensor, Tensor]:
    """Run all steps of each frame in turn. Gradients do not flow between frames: the guidance is detached.

    Args:
        low_res: (n, frames, 3, h, w) in [-1, 1].
        noise: (n, frames, latent channels, h, w), unit Gaussian.
        context: (n, tokens, width).

    Returns:
        The latents (n, frames, latent channels, h, w) and their pictures (n, frames, 3, 4h, 4w), about [-1, 1].
    """
    vae = temporal_autoencoder_of(model)
    latents: list[Tensor] = []
    pictures: list[Tensor] = []
    for frame in range(low_res.shape[1]):
        condition = embedding = None
        if frame > 0:
            condition = _guidance(model, pictures[-1], low_res[:, frame], low_res[:, frame - 1])
            embedding = model.tcm.embed(condition)
        x = noise[:, frame]
        for step in steps:
            _, x = denoise(model, x, low_res[:, frame], context, step, None, embedding)
        latents.append(x)
        pictures.append(vae.decode(x, () if condition is None else vae.features(condition)).float())
    return torch.stack(latents, dim=1), torch.stack(pictures, dim=1)


@torch.no_grad()
def _guidance(model: Networks, previous: Tensor, low_res: Tensor, previous_low_res: Tensor) -> Tensor:
    """The previous finished frame (n, 3, 4h, 4w), warped to the current one, the same shape."""
    with torch.autocast(previous.device.type, enabled=False):  # half precision rounds coordinates by whole pixels
        half = model.sampling.flow.half_size
        return warp_published(previous, estimate_flow(flow_network_of(model), low_res, previous_low_res, half))


def _decode_truth(model: Networks, truth: Tensor, teacher: VAE, motion: Motion | None) -> Tensor:
    """The teacher's latents of clips (n, frames, 3, 4h, 4w), decoded by the model: the same shape.

    The features are those of the true previous frame, warped along the true flow; without a flow it stays in place.
    """
    vae, (count, frames) = temporal_autoencoder_of(model), truth.shape[:2]
    latent = latent_of(teacher, truth.flatten(0, 1)).unflatten(0, (count, frames))
    first = vae.decode(latent[:, 0]).float()[:, None]
    previous = truth[:, :-1].flatten(0, 1)
    if motion is not None:
        previous = warp_published(previous, motion[0].flatten(0, 1))
    rest = vae.decode(latent[:, 1:].flatten(0, 1), vae.features(previous)).float()
    return torch.cat([first, rest.unflatten(0, (count, frames - 1))], dim=1)


def stream_vae_loss(
    model: Networks,
    truth: Tensor,
    low_res: Tensor,
    noise: Tensor,
    context: Tensor,
    objective: Objective,
    motion: Motion | None,
) -> Tensor:
    """Loss of the temporal tiny autoencoder on short clips; all other parts are frozen.

    The decoder learns from what it decodes at inference, with and without the features of the previous frame, or, with
    `encoded`, from the truth as the teacher encodes it. The encoder's latents are regressed to the teacher's.

    Args:
        truth: (n, frames, 3, 4h, 4w) in [-1, 1].
        low_res: (n, frames, 3, h, w) in [-1, 1].
        noise: (n, frames, latent channels, h, w).
        context: (n, tokens, width).
        motion: without ground-truth flow there is no temporal term.
    """
    if objective.recipe.encoded and objective.teacher is not None:
        pictures = _decode_truth(model, truth, objective.teacher, motion)
    else:
        _, pictures = roll_out_stream(model, low_res, noise, context, objective.steps(model))
    loss = pictures_loss(_fixed(model, pictures, low_res), truth, objective, motion)
    if objective.teacher is not None and objective.recipe.latent:
        frame = truth[:, 0]
        latent = temporal_autoencoder_of(model).encode(frame).float()
        loss = loss + objective.recipe.latent * F.mse_loss(latent, latent_of(objective.teacher, frame))
    return loss


def stream_tcm_loss(
    model: Networks,
    truth: Tensor,
    low_res: Tensor,
    noise: Tensor,
    context: Tensor,
    objective: Objective,
    motion: Motion | None,
) -> Tensor:
    """Loss of the TCM on short clips, from the second frame on, for the first one has no guidance.

    Args: as of `stream_vae_loss`.
    """
    latents, pictures = roll_out_stream(model, low_res, noise, context, objective.steps(model))
    target = latent_of(model.vae, truth[:, 1:].flatten(0, 1))
    latent = objective.recipe.latent * F.mse_loss(latents[:, 1:].flatten(0, 1), target)
    return latent + pictures_loss(_fixed(model, pictures, low_res), truth, objective, motion, first=1)


def _fixed(model: Networks, pictures: Tensor, low_res: Tensor) -> Tensor:
    """Clips (n, frames, 3, 4h, 4w) with the color fix of the weights, as the stream writes them."""
    return with_color_fix(model, pictures.flatten(0, 1), low_res.flatten(0, 1)).view_as(pictures)
