"""Mild random degradations: blur, resampling, noise and compression, as found in real footage."""

import io
from collections.abc import Callable

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.media.codecs import x264_params
from stablevsr.training.scene import Random

BLUR = (0.2, 1.4)  # standard deviation, in HR pixels
NOISE = (0.002, 0.02)  # standard deviation, in [0, 1]
JPEG_QUALITY = (60, 96)
CRF = (18, 33)  # H.264 constant rate factor
# Shares of the degraded clips. Most are compressed only: where blur and other kernels were frequent, models sharpened
# clean frames less (recipes/README.md).
BLURRED = NOISY = 0.2
COMPRESSED = {"none": 0.05, "jpeg": 0.15, "h264": 0.8}

Resample = Callable[[Tensor, tuple[int, int]], Tensor]


def degrade(frames: Tensor, random: Random) -> Tensor:
    """HR frames (n, 3, 4h, 4w) in [0, 1] to degraded LR frames (n, 3, h, w) in [0, 1].

    Optional blur, one of three resampling kernels, optional noise, and no compression, JPEG or H.264; all frames of
    a clip share the same choices.
    """
    if random.random() < BLURRED:
        frames = gaussian_blur(frames, random.uniform(*BLUR))
    size = (frames.shape[-2] // SCALE, frames.shape[-1] // SCALE)
    frames = RESAMPLERS[random.choice(len(RESAMPLERS), p=RESAMPLED)](frames, size).clamp(0, 1)
    if random.random() < NOISY:
        noise = random.standard_normal(frames.shape, np.float32) * random.uniform(*NOISE)
        frames = (frames + torch.from_numpy(noise).float()).clamp(0, 1)
    pictures = (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    compression = random.choice(list(COMPRESSED), p=list(COMPRESSED.values()))
    if compression == "jpeg":
        pictures = through_jpeg(pictures, int(random.integers(*JPEG_QUALITY)))
    elif compression == "h264":
        pictures = through_h264(pictures, int(random.integers(*CRF)))
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 255


def _interpolation(mode: str) -> Resample:
    return lambda frames, size: F.interpolate(frames, size=size, mode=mode, antialias=True, align_corners=False)


RESAMPLERS: tuple[Resample, ...] = (
    _interpolation("bicubic"),
    _interpolation("bilinear"),
    lambda frames, size: F.interpolate(frames, size=size, mode="area"),
)
RESAMPLED = (0.6, 0.2, 0.2)  # their shares


def gaussian_blur(frames: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (n, c, h, w) with replicate padding; `sigma` in pixels."""
    radius = max(round(3 * sigma), 1)
    offsets = torch.arange(-radius, radius + 1, dtype=frames.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(frames.shape[1], 1, -1)
    padded = F.pad(frames, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=frames.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=frames.shape[1])


def through_jpeg(pictures: np.ndarray, quality: int) -> np.ndarray:
    """JPEG round trip of (n, h, w, 3) uint8, with 4:2:0 chroma."""

    def one(picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return np.array(Image.open(file))

    return np.stack([one(picture) for picture in pictures])


def through_h264(pictures: np.ndarray, crf: int) -> np.ndarray:
    """H.264 round trip of (n, h, w, 3) uint8 at a constant rate factor, 4:2:0; odd sizes are padded and cropped."""
    height, width = pictures.shape[1:3]
    padded = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # One thread: the number of slices, and so the result, depends on the thread count.
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1"} | x264_params()
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
        for picture in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as written:
        frames = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    return np.stack(frames)[:, :height, :width]
