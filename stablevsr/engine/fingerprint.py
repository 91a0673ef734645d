"""What two runs must share for one to continue the other."""

import hashlib
import json
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from stablevsr import __version__
from stablevsr.errors import InputError
from stablevsr.fields import to_dict
from stablevsr.media import Reader
from stablevsr.media.paths import IMAGE_SUFFIXES
from stablevsr.model import Model
from stablevsr.runtime import describe
from stablevsr.sampling.config import SIZES, SamplingConfig


def fingerprint(model: Model, clip: Reader, config: SamplingConfig) -> dict[str, object]:
    """Everything that changes the bits of a result, by name."""
    return {
        "division": "none",
        "version of stablevsr": __version__,
        "input": hash_input(clip.path),
        "part": clip.part,
        "weights": hash_weights(model),
        **describe(model),
        # The size counts where it is in the outputs from the first frame on; elsewhere it may change to the last.
        **{k: v for k, v in config.flat().items() if k not in SIZES or (v is not None and config.mode == "streaming")},
        "noise_level": config.noise_level_for(model.config),
    }


def shared_fingerprint(
    machine: dict[str, str], clip: Reader, config: SamplingConfig, division: str
) -> dict[str, object]:
    """As `fingerprint`, for a run whose scenes are sampled by several processes, none of which need be this one.

    The model of the GPU is left out, so that machines can be added and replaced.

    Args:
        machine: versions, weights and precision that all of them share.
        division: what each of them samples on its own, as in "into scenes".
    """
    return {
        "division": division,
        **machine,
        "input": hash_input(clip.path),
        "part": clip.part,
        **config.flat(),
    }


# For each model, the state of its tensors and their digest: a batch of clips hashes gigabytes once. The state does not
# depend on where the tensors are, because an offloaded model moves them.
_known: WeakKeyDictionary[object, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def hash_weights(model: Model) -> str:
    """A digest of the config and of all weights; cached until a tensor changes."""
    state = [(id(tensor), tensor._version) for tensor in chain(model.parameters(), model.buffers())]
    known_state, known = _known.get(model, (None, ""))
    if state != known_state:
        known = _hash(model)
        _known[model] = state, known
    return known


def _hash(model: Model) -> str:
    digest = hashlib.sha256(json.dumps(to_dict(model.config)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def hash_input(path: Path) -> str:
    """A digest of a file, or of exactly those files in a folder that its reader reads."""
    digest = hashlib.sha256()
    try:
        for file in sorted(filter(_is_read, path.iterdir())) if path.is_dir() else [path]:
            with file.open("rb") as content:
                digest.update(file.name.encode(errors="surrogateescape"))
                digest.update(hashlib.file_digest(content, "sha256").digest())
    except OSError as error:
        raise InputError(f"input {error.filename or path} cannot be read ({error.strerror}): check it") from error
    return digest.hexdigest()[:16]


def _is_read(file: Path) -> bool:
    # As `media.still_reader.FolderReader` chooses: files that the system adds to the folder change nothing.
    return not file.name.startswith(".") and file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()
