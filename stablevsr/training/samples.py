"""Sample images during training: results on a few windows next to the ground truth."""

import torch
from torch import Tensor
from torchvision.utils import flow_to_image

from stablevsr.engine.memory import sample_video
from stablevsr.model import StableVSR
from stablevsr.sampling.config import PRESETS, SamplingConfig
from stablevsr.sampling.flow import estimate_flow
from stablevsr.sampling.pictures import as_tensor, bicubic
from stablevsr.training.data import Window
from stablevsr.training.losses import autoencoder_of, flow_network_of, tiny_decoder_of

EXACT = PRESETS["exact"].with_fields({"steps": 20})  # fewer steps, for a quick preview


def vae_columns(model: StableVSR, window: Window) -> list[Tensor]:
    """Ground truth and its reconstruction by the autoencoder."""
    truth, vae = window["hr"][:1], autoencoder_of(model)
    return [truth, vae.decode(vae.encode(truth).mean)]


def unet_columns(model: StableVSR, window: Window) -> list[Tensor]:
    """Bicubic, a sample of the base model, ground truth."""
    low_res = window["lr"][:1]
    sample = _sampled(model, low_res / 2 + 0.5, EXACT)
    return [bicubic(low_res), sample * 2 - 1, window["hr"][:1]]


def tcm_columns(model: StableVSR, window: Window) -> list[Tensor]:
    """Bicubic, a sample, ground truth: the middle frame, with the whole window sampled."""
    low_res, middle = window["lr"], slice(1, 2)
    sample = _sampled(model, low_res / 2 + 0.5, EXACT)
    return [bicubic(low_res[middle]), sample[middle] * 2 - 1, window["hr"][middle]]


def flow_columns(model: StableVSR, window: Window) -> list[Tensor]:
    """The frame, estimated and true flow; hue is the direction, and both share one scale."""
    source, target = window["lr"][:1], window["lr"][1:2]
    flows = torch.cat([estimate_flow(flow_network_of(model), target, source), window["flow"][:1]])
    return [window["hr"][1:2], *(flow_to_image(flows).to(target) / 127.5 - 1).split(1)]


def tiny_columns(model: StableVSR, window: Window) -> list[Tensor]:
    """Ground truth and its latent decoded by the autoencoder and the tiny decoder."""
    truth, vae = window["hr"][:1], autoencoder_of(model)
    latent = vae.encode(truth).mean
    return [truth, vae.decode(latent), tiny_decoder_of(model)(latent * vae.scaling_factor)]


def rollout_columns(model: StableVSR, window: Window) -> list[Tensor]:
    """Bicubic, a sample with the distilled steps, ground truth: the middle frame."""
    low_res = window["lr"]
    middle = slice(len(low_res) // 2, len(low_res) // 2 + 1)
    sample = _sampled(model, low_res / 2 + 0.5, model.sampling.with_fields({"scene_cuts": "off"}))
    return [bicubic(low_res[middle]), sample[middle] * 2 - 1, window["hr"][middle]]


def _sampled(model: StableVSR, frames: Tensor, config: SamplingConfig) -> Tensor:
    return as_tensor(sample_video(model, frames, config))


COLUMNS = {
    "vae": vae_columns,
    "unet": unet_columns,
    "tcm": tcm_columns,
    "flow": flow_columns,
    "tiny": tiny_columns,
    "rollout": rollout_columns,
    "vae-rollout": rollout_columns,
    "joint-rollout": rollout_columns,
    "tcm-rollout": rollout_columns,
    "stream-vae": rollout_columns,
    "stream-tcm": rollout_columns,
}


@torch.no_grad()
def sample_picture(model: StableVSR, stage: str, windows: list[Window]) -> Tensor:
    """One row per window: (h, w, 3) uint8 on the CPU."""
    rows = [torch.cat([column.cpu() for column in COLUMNS[stage](model, window)], dim=-1) for window in windows]
    picture = torch.cat(rows, dim=-2)[0].float()
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
