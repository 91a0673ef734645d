"""What tests of streaming share: recorded cases, a small random model, and the published text as plain code."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from models import DATA, TINY, random_model
from safetensors import safe_open
from torch import Tensor

from stablevsr.architectures import STABLEVSR, STREAM_DIFFVSR
from stablevsr.config import ModelConfig, TemporalTinyConfig
from stablevsr.convert.assemble import Sources, convert
from stablevsr.model import StableVSR

__all__ = ["STABLEVSR", "STREAM_DIFFVSR", "TINY"]
STREAM = DATA / "stream"
TINY_STREAM = replace(TINY, vae=TemporalTinyConfig(width=8), tiny=None, schedule=STREAM_DIFFVSR.schedule)


def published_folder(path: Path) -> Path:
    """A copy of the recorded checkpoint, whole: its tokenizer is that of the other one."""
    shutil.copytree(STREAM / "checkpoint", path)
    shutil.copytree(DATA / "checkpoint/tokenizer", path / "tokenizer")
    return path


def convert_recorded(folder: Path) -> Path:
    """The recorded checkpoint as a weights file in a folder, with text encoder and flow."""
    path = folder / "stream.safetensors"
    sources = Sources(published_folder(folder / "Stream-DiffVSR"), DATA / "golden/raft_small.pth", with_text=True)
    convert(sources, path)
    return path


def random_stream_model(config: ModelConfig = TINY_STREAM) -> StableVSR:
    """Random weights; every alpha is another number, some outside of [0, 1]. Pictures are neither black nor white."""
    model = random_model(config)
    last = model.vae.decoder.conv_out
    last.weight *= 6
    last.bias -= model.vae.decode(torch.randn(1, model.config.vae.latent_channels, 16, 16)).mean((0, 2, 3)) / 2
    alphas = [parameter for name, parameter in model.vae.named_parameters() if name.endswith("alpha")]
    for i, alpha in enumerate(alphas):
        alpha.fill_(-0.2 + 0.1 * i)
    return model


def recorded(case: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and options of a recorded case."""
    with safe_open(STREAM / f"{case}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, metadata


class Transcript:
    """The temporal tiny autoencoder as the reference text has it, on a published state dict; see `decode`."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, x: Tensor, layer: str, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.weights[f"{layer}.weight"], self.weights.get(f"{layer}.bias"), stride, 1)

    def block(self, x: Tensor, layer: str, previous: Tensor | None = None) -> Tensor:
        y = self.conv(x, f"{layer}.conv.0").relu()
        y = self.conv(y, f"{layer}.conv.2").relu()
        y = self.conv(y, f"{layer}.conv.4")
        if previous is not None:
            y = y + 0.1 * self.mixed(y, previous, layer)
        return (y + x).relu()

    def mixed(self, y: Tensor, previous: Tensor, layer: str) -> Tensor:
        """Position by position: the convolutions of the TPM as sums over one list of both frames' positions."""
        (_, width, h, w), rows, columns = y.shape, y.shape[2] // 4, y.shape[3] // 4
        sequence = [
            frame[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean((1, 2))
            for frame in (y, previous)
            for row in range(rows)
            for column in range(columns)
        ]
        for place in (0, 2):
            kernel = self.weights[f"{layer}.temporal_processor.{place}.weight"]
            bias = self.weights[f"{layer}.temporal_processor.{place}.bias"]
            padded = [torch.zeros_like(bias), *sequence, torch.zeros_like(bias)]
            sequence = [
                bias + sum(kernel[:, :, tap] @ padded[i + tap] for tap in range(3)) for i in range(len(sequence))
            ]
            if place == 0:
                sequence = [position.relu() for position in sequence]
        n, alpha = rows * columns, self.weights[f"{layer}.alpha"]
        fused = [alpha * sequence[i] + (1 - alpha) * sequence[n + i] for i in range(n)]
        grid = torch.stack(fused, -1).view(1, width, rows, columns)
        return F.interpolate(grid, (h, w), mode="bilinear", align_corners=False)

    def features(self, picture: Tensor) -> list[Tensor]:
        """Of a picture in [-1, 1], in the encoder's order."""
        x, found = self.conv(picture, "encoder.layers.0"), []
        for layer in range(1, 10):
            if layer in (2, 6):
                x = self.conv(x, f"encoder.layers.{layer}", stride=2)
            else:
                x = self.block(x, f"encoder.layers.{layer}")
                found.append(x)
        return found

    def decode(self, z: Tensor, features: list[Tensor] | None = None) -> Tensor:
        """`features` are in the encoder's order."""
        past = dict(zip((2, 3, 4, 7, 8, 9, 12), features[::-1], strict=True)) if features else {}
        x = self.conv(torch.tanh(z / 3) * 3, "decoder.layers.0").relu()
        for layer in (2, 3, 4, 6, 7, 8, 9, 11, 12):
            if layer in (6, 11):
                x = self.conv(x.repeat_interleave(2, -1).repeat_interleave(2, -2), f"decoder.layers.{layer}")
            else:
                x = self.block(x, f"decoder.layers.{layer}", past.get(layer))
        return self.conv(x, "decoder.layers.13") * 2 - 1
