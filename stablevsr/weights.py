"""The single-file weights format: safetensors whose metadata contains everything needed to build the model.

Tensors are named `part.parameter` (parts: unet, tcm, vae, flow, tiny, text), plus `empty_prompt`, the text tower's
output for the empty prompt, (tokens, width). The metadata has, as JSON: `config` (`ModelConfig`), `provenance` (the
source of each part), `naming` (the published spelling, for writing it back), `tokenizer` (the contents of the
vocabulary files, if there is a text tower), and `sampling` (the `SamplingConfig` recommended for the weights; files of
earlier versions lack it and get the default).
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stablevsr.atomic import replacing
from stablevsr.config import ModelConfig
from stablevsr.errors import OptionsError, ResourceError, UserError, WeightsError
from stablevsr.fields import from_dict, to_dict
from stablevsr.prompt import VOCABULARY_FILES
from stablevsr.sampling.config import SamplingConfig

FORMAT = "stablevsr-1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CONVERT_HINT = "make one with stablevsr convert"


@dataclass(frozen=True)
class Header:
    """The metadata of a weights file."""

    config: ModelConfig
    provenance: dict[str, str] = field(default_factory=dict)
    naming: dict[str, str] = field(default_factory=dict)
    tokenizer: dict[str, str] | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def to_metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "config": json.dumps(to_dict(self.config)),
            "provenance": json.dumps(self.provenance),
            "naming": json.dumps(self.naming),
            "tokenizer": json.dumps(self.tokenizer),
            "sampling": json.dumps(to_dict(self.sampling)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> "Header":
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "no format")
            raise WeightsError(
                f"{path} has the format {found!r}, expected {FORMAT!r}: it is no stablevsr file, {CONVERT_HINT}"
            )
        try:
            parts = {key: json.loads(metadata[key]) for key in ("config", "provenance", "naming", "tokenizer")}
            for key in ("provenance", "naming", "tokenizer"):
                texts = parts[key]
                if key == "tokenizer" and texts is None:
                    continue
                if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
                    raise ValueError(f"{key} is not an object of strings")
            if not set(parts["tokenizer"] or ()) <= set(VOCABULARY_FILES):
                raise ValueError(f"tokenizer holds other files than {', '.join(VOCABULARY_FILES)}")
            sampling = from_dict(SamplingConfig, json.loads(metadata.get("sampling", "{}")))
            return cls(from_dict(ModelConfig, parts.pop("config")), **parts, sampling=sampling)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} has damaged metadata ({error!r}): {CONVERT_HINT}") from error
        except UserError as error:
            raise WeightsError(f"{path}: {error}") from error


def read_header(path: Path) -> Header:
    """The header only; no tensor is read. Raises `WeightsError` for anything but a weights file of ours."""
    if not path.is_file():
        if path.is_dir():
            raise WeightsError(f"weights {path} is a folder: {CONVERT_HINT}")
        raise WeightsError(f"weights {path} does not exist: {CONVERT_HINT}, or give a name of stablevsr models")
    try:
        with safe_open(path, framework="pt") as file:
            return Header.from_metadata(file.metadata() or {}, path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file ({error}): {CONVERT_HINT}") from error


def is_ours(path: Path) -> bool:
    """Whether the metadata declares a stablevsr weights file; False for anything but safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of any safetensors file, memory-mapped; `WeightsError` if it is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"weights {path} {'is a folder, expected a file' if path.is_dir() else 'does not exist'}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file ({error}): get or make it again") from error


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and memory-mapped tensors, in the dtype of the file. Names and values are not checked."""
    return read_header(path), load_file(path)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises `WeightsError`, naming `source` and the key, for NaN or infinity."""
    for name in _not_finite(tensors):
        raise WeightsError(f"{source}: tensor {name} holds NaN or infinity: the file is damaged, get or make it again")


def _not_finite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        # NaN and infinity propagate to the extremes, which takes no temporary as large as the tensor.
        if tensor.is_floating_point() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            yield name


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raises `WeightsError`, naming `source` and the keys, unless names and shapes are exactly the `expected` ones."""
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    for what, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise WeightsError(f"{source} {what} {', '.join(names[:3])}{more}: it does not match its config")
    for name, tensor in tensors.items():
        found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if found != wanted:
            raise WeightsError(f"{source}: {name} has shape {found}, expected {wanted}: it does not match its config")
        dtypes = FLOATS if expected[name].is_floating_point() else (torch.int64,)
        if tensor.dtype not in dtypes:
            choices = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise WeightsError(f"{source}: {name} is of type {tensor.dtype}, expected one of {choices}")


def write(path: Path, header: Header, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a weights file atomically.

    Args:
        tensors: named as in the model's state dict. Memory-mapped ones are written without being read into memory.
        dtype: of the floating-point tensors, except for the empty prompt's embedding, which is small and stays
            float32; None keeps the dtype of each.

    Raises:
        ResourceError: when the file cannot be written.
        OptionsError: when a value exceeds the range of `dtype`.
    """
    try:
        with replacing(path) as part, tempfile.TemporaryDirectory(prefix=".stablevsr-", dir=part.parent) as scratch:
            ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
            if dtype is not None:
                ready |= _cast(ready, dtype, Path(scratch) / "cast", path)
            save_file(ready, part, metadata=header.to_metadata())
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:  # safetensors raises them all
        reason = " ".join(str(error).split())  # some span several lines
        raise ResourceError(f"{path} could not be written ({reason}); nothing was changed") from error


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, scratch: Path, path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of another dtype, cast to `dtype` in a memory-mapped file, to save memory."""
    todo = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dtype != dtype and name != "empty_prompt"
    }
    if not todo:
        return {}
    size = sum(tensor.numel() for tensor in todo.values())
    with scratch.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            # Reserved now: on a full disk, writing to the mapped file would kill the process instead of raising.
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    space = torch.from_file(str(scratch), shared=True, size=size, dtype=dtype)
    done, start = {}, 0
    for name, tensor in todo.items():
        done[name] = space[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        start += tensor.numel()
    for name in _not_finite(done):
        raise OptionsError(
            f"{path}: tensor {name} exceeds the range of {str(dtype).removeprefix('torch.')}: choose bf16 or fp32"
        )
    return done
