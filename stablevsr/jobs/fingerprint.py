"""What two runs must share for one to go on with the other."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from stablevsr import __version__
from stablevsr.config import to_dict
from stablevsr.errors import UserError
from stablevsr.media import Reader
from stablevsr.media.paths import IMAGE_SUFFIXES
from stablevsr.model import StableVSR
from stablevsr.runtime import describe
from stablevsr.sampling.video import used_noise_level


def fingerprint(
    model: StableVSR, clip: Reader, settings: dict[str, object], weights: Callable[[], str] | None = None
) -> dict[str, object]:
    """Everything that changes the bits of a result, by name.

    Args:
        settings: all options of the run, those that were left out too.
        weights: gives `hash_weights` of `model`, from an earlier call; None computes it.
    """
    return {
        "version of stablevsr": __version__,
        "input": hash_input(clip.path),
        "part": clip.part,
        "weights": weights() if weights else hash_weights(model),
        **describe(model),
        **normalised(model, settings),
    }


def hash_weights(model: StableVSR) -> str:
    """A digest of the config and of all weights."""
    digest = hashlib.sha256(json.dumps(to_dict(model.config)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def hash_input(path: Path) -> str:
    """A digest of a file, or of exactly those files of a folder that its reader takes."""
    digest = hashlib.sha256()
    try:
        for file in sorted(filter(_is_read, path.iterdir())) if path.is_dir() else [path]:
            with file.open("rb") as content:
                digest.update(file.name.encode(errors="surrogateescape"))
                digest.update(hashlib.file_digest(content, "sha256").digest())
    except OSError as error:
        raise UserError(f"input {error.filename or path} cannot be read ({error.strerror}); check it") from error
    return digest.hexdigest()[:16]


def normalised(model: StableVSR, settings: dict[str, object]) -> dict[str, object]:
    """The same values for settings that mean the same, flat."""
    flat = {name: value for name, value in settings.items() if name != "guidance"}
    flat |= {f"guidance {name}": value for name, value in asdict(settings["guidance"]).items()}
    for name in ("prompt", "negative_prompt"):
        flat[name] = settings[name] or None  # both are the empty prompt
    flat["noise_level"] = used_noise_level(model, settings["noise_level"])
    return flat


def _is_read(file: Path) -> bool:
    # As `media.still_reader.FolderReader` chooses: a file that the system drops into the folder changes nothing.
    return not file.name.startswith(".") and file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()
