"""Weights and devices, by ComfyUI's rules: its model folders, its choice of device, its management of memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management as management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from stablevsr import build_model
from stablevsr.model import StableVSR
from stablevsr.runtime import Offloaded

FOLDER = "stablevsr"  # among ComfyUI's model folders
BUNDLED = "small model (bundled)"
DTYPES = ("auto", "fp32", "bf16", "fp16")
# Working memory in bytes per pixel of an LR frame and byte of a number, and at least this much: the VAE and the flow
# network of the published model, in benchmarks/results/memory_counted.json.
PER_PIXEL, AT_LEAST = 12_000, 1_400_000_000

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def weights_names() -> list[str]:
    """What there is to choose from: the bundled weights, and the files in models/stablevsr."""
    return [BUNDLED, *(name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors"))]


class Holder(nn.Module):
    """The model as `ModelPatcher` wants it: that assigns `device`, which `StableVSR` computes."""

    def __init__(self, model: StableVSR) -> None:
        super().__init__()
        self.stablevsr = model


@dataclass(frozen=True)
class LoadedModel:
    """What the node Load StableVSR hands on.

    model: for its config, and for the work once it is on a device.
    patcher: through which ComfyUI moves it; None with offloading, where each network is on the GPU only for its turn.
    """

    model: StableVSR | Offloaded
    patcher: ModelPatcher | None

    @contextmanager
    def on_device(self, height: int, width: int) -> Iterator[StableVSR | Offloaded]:
        """The model, ready for LR frames of this size; other models leave the device as far as they must."""
        needed = max(AT_LEAST, PER_PIXEL * self.model.dtype.itemsize * height * width)
        if self.patcher is not None:
            # All of it: the networks are not ComfyUI's, and cannot run with a part of their weights elsewhere.
            management.load_models_gpu([self.patcher], memory_required=needed, force_full_load=True)
            yield self.model
            return
        largest = max(management.module_size(network) for _, network, part in self.model.parts() if part.offloaded)
        management.free_memory(largest + needed, self.model.device)
        try:
            yield self.model
        finally:
            self.model.load(nn.Identity())  # an empty network takes the place of the last one on the GPU
            management.soft_empty_cache()


def load(name: str, dtype: str, offload: bool) -> LoadedModel:
    """Load weights by their name in `weights_names`, or from a file anywhere.

    Raises:
        UserError: for a file that is not ours, and offloading without a GPU.
    """
    device = management.get_torch_device()
    if dtype == "auto":
        dtype = "bf16" if management.should_use_bf16(device) else "fp32"
    path = _find(name)
    if offload:
        return LoadedModel(build_model(path, device, dtype, offload=True), None)
    model = build_model(path, "cpu", dtype)
    assert isinstance(model, StableVSR)  # not offloaded
    patcher = ModelPatcher(Holder(model), load_device=device, offload_device=management.unet_offload_device())
    return LoadedModel(model, patcher)


def _find(name: str) -> str | None:
    """What `build_model` takes for this: a path as text, because it looks for a name that is no file elsewhere."""
    if name == BUNDLED:
        return None
    return folder_paths.get_full_path(FOLDER, name) or os.path.expanduser(name)


def to_frames(images: torch.Tensor) -> torch.Tensor:
    """ComfyUI's images (n, h, w, c) in [0, 1] to (n, 3, h, w); an alpha channel is left out."""
    return images[..., :3].movedim(-1, 1).contiguous()


def to_images(frames: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) in [0, 1] to ComfyUI's images (n, h, w, 3), on the device where it keeps results."""
    return frames.movedim(1, -1).contiguous().float().to(management.intermediate_device())
