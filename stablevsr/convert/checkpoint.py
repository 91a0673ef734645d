"""Reading tensors and JSON from published files, memory-mapped where possible. Pickles never run code."""

import json
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablevsr.errors import WeightsError
from stablevsr.weights import read_safetensors

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = (".bf16", ".fp16", ".fp32", ".non_ema")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `WeightsError` for a missing file and for anything else."""
    text = read_text_file(path)
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_text_file(path: Path) -> str:
    """The text of a file; `WeightsError` if it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing: the folder is incomplete, download it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read as text ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or a pickle (.bin, .ckpt, .pt, .pth), in the file's dtype.

    Raises:
        WeightsError: for a missing, damaged or unknown file, and for a pickle that contains more than tensors.
    """
    if not path.is_file():
        raise WeightsError(f"weights {path} {'is a folder, expected a file' if path.is_dir() else 'does not exist'}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in PICKLES:
        return _tensors_of(_read_pickle(path), path)
    raise WeightsError(f"{path} has an unknown type, expected .safetensors or one of {', '.join(PICKLES)}")


def _read_pickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # files older than torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged, or a pickle that would run code, which is refused: get it as .safetensors"
        ) from error
    except Exception as error:  # anything but a pickle fails in many ways
        raise WeightsError(f"{path} is damaged or not a PyTorch file ({error}): download it again") from error


def _tensors_of(value: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]  # training checkpoints contain more than weights
    if not isinstance(value, dict) or not value:
        raise WeightsError(f"{path} holds a {type(value).__name__}, expected named tensors")
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise WeightsError(f"{path} has a tensor named {name!r}, expected strings")
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: {name} is a {type(tensor).__name__}, expected a tensor")
    return value


def find_weights(folder: Path, variant: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of one component of a diffusers folder, and the name of the file they came from."""
    name = choose_weights([path.name for path in folder.glob("*") if path.is_file()], str(folder), variant)
    return _read_shards(folder / name) if name.endswith(".json") else read_tensors(folder / name), name


def choose_weights(names: Collection[str], source: str, variant: str | None = None) -> str:
    """The file, or the index of shards, to read of those in one folder of the diffusers layout.

    Prefers .safetensors to .bin, and full precision to a variant unless one is requested.

    Args:
        source: the folder, for messages.

    Raises:
        WeightsError: when there is none.
    """
    present = set(names)
    variants = [f".{variant}"] if variant else ["", *(each for each in VARIANTS if any(each in name for name in names))]
    for spelling in variants:
        for suffix in (".safetensors", ".bin"):
            for stem in STEMS:
                indices = f"{stem}{suffix}.index{spelling}.json", f"{stem}{spelling}{suffix}.index.json"
                for name in (f"{stem}{spelling}{suffix}", *indices):
                    if name in present:
                        return name
    wanted = f"{STEMS[0]}{variants[0]}.safetensors"
    raise WeightsError(f"{source} holds no weights: expected {wanted} (or {STEMS[1]}..., .bin, or an index of shards)")


def shards_of(index: str, names: Collection[str]) -> list[str]:
    """The shards that belong to an index from `choose_weights`, of the files in its folder, by their names."""
    suffix = ".safetensors" if ".safetensors" in index else ".bin"
    spelling = next((each for each in VARIANTS if each in index), "")
    found = [name for name in names if "-of-" in name and name.endswith(suffix)]
    return sorted(name for name in found if spelling in name and (spelling or not any(v in name for v in VARIANTS)))


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index} has no weight_map: it is not a shard index")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise WeightsError(f"{index} names {name!r}, expected a file in its own folder")
        tensors |= read_tensors(index.parent / name)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise WeightsError(f"{index} lists {missing[0]}, but its shard does not contain it: download the shards again")
    return tensors
