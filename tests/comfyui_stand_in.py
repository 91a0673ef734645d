"""A stand-in of the few modules of ComfyUI that our nodes use: written here, after its documented interfaces.

It records what the nodes ask for. Its video classes wrap files, as ComfyUI's do.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import pytest
import torch


class InterruptProcessingException(Exception):
    """What ComfyUI raises in a node when the user interrupts."""


@dataclass
class ComfyUI:
    """What the nodes have asked for."""

    models: Path
    temporary: Path
    interrupt_at: int = 0  # moves of the bar after which the user interrupts; 0: never
    bar: list[tuple[int, int]] = field(default_factory=list)  # done, total
    loaded: list["ModelPatcher"] = field(default_factory=list)
    memory_required: float = 0
    freed: list[float] = field(default_factory=list)


class ModelPatcher:
    def __init__(self, model: torch.nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        assert not hasattr(type(model), "device")  # ComfyUI assigns it
        model.device = offload_device
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


class VideoFromFile:
    def __init__(self, file: str, duration: float = 0) -> None:
        self._file, self._duration = file, duration

    def get_stream_source(self) -> str:
        return self._file

    def get_dimensions(self) -> tuple[int, int]:
        with av.open(self._file) as container:
            return container.streams.video[0].width, container.streams.video[0].height

    def get_duration(self) -> float:
        with av.open(self._file) as container:
            return self._duration or container.duration / av.time_base

    def save_to(self, path: str) -> None:
        Path(path).write_bytes(Path(self._file).read_bytes())


class VideoFromImages:
    """A video without a file of its own."""

    def __init__(self, like: Path) -> None:
        self._like = like

    def save_to(self, path: str) -> None:
        Path(path).write_bytes(self._like.read_bytes())


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    """Put the modules in place of ComfyUI's."""
    comfy = ComfyUI(folder / "models", folder / "temp")
    cpu = torch.device("cpu")

    def load_models_gpu(models: list[ModelPatcher], memory_required: float, force_full_load: bool) -> None:
        assert force_full_load
        for patcher in models:
            patcher.model.to(patcher.load_device)
        comfy.loaded, comfy.memory_required = models, memory_required

    def interrupted() -> None:
        if comfy.interrupt_at and len(comfy.bar) >= comfy.interrupt_at:
            raise InterruptProcessingException

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self._total = total

        def update_absolute(self, value: int) -> None:
            comfy.bar.append((value, self._total))

    modules: dict[str, dict[str, object]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "intermediate_device": lambda: cpu,
            "should_use_bf16": lambda device: device.type != "cpu",
            "load_models_gpu": load_models_gpu,
            "free_memory": lambda memory, device: comfy.freed.append(memory),
            "module_size": lambda network: sum(each.nbytes for each in network.state_dict().values()),
            "soft_empty_cache": lambda: None,
            "throw_exception_if_processing_interrupted": interrupted,
        },
        "comfy_api": {},
        "comfy_api.input_impl": {"VideoFromFile": VideoFromFile},
        "folder_paths": folder_functions(comfy),
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
    return comfy


def folder_functions(comfy: ComfyUI) -> dict[str, object]:
    """The members of ComfyUI's `folder_paths`."""
    known: dict[str, list[Path]] = {}

    def files(kind: str) -> dict[str, Path]:
        return {each.name: each for folder in known[kind] for each in sorted(folder.glob("*"))}

    functions: dict[str, Callable[..., object]] = {
        "add_model_folder_path": lambda kind, folder: known.setdefault(kind, []).append(Path(folder)),
        "get_filename_list": lambda kind: sorted(files(kind)),
        "get_full_path": lambda kind, name: str(files(kind)[name]) if name in files(kind) else None,
        "get_temp_directory": lambda: str(comfy.temporary),
    }
    return vars(SimpleNamespace(**functions, models_dir=str(comfy.models)))
