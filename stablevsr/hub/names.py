"""Names of models on the hub, and those that this package is known to read. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from stablevsr.errors import OptionsError

PREFIX = "hub:"  # marks a name where a file is expected too
_PART = r"\w(?:[\w.-]*\w)?"  # the hub's rules, to which `_is_repo` adds
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w-][\w./-]*))?", re.ASCII)
MAX_LENGTH = 96  # of OWNER/NAME
_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Name:
    """A model on the hub.

    repo: "OWNER/NAME".
    revision: a branch, a tag or a commit; None is the latest.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_name(text: str) -> Name | None:
    """The model that `text` names: hub:OWNER/NAME, OWNER/NAME, either with @REVISION; None if it names a file.

    Without the prefix a file of that name comes first. A slash at the end, as of folders, changes nothing.

    Raises:
        OptionsError: for anything else after the prefix, and for a web address.
    """
    if "://" in text:
        raise OptionsError(f"got the web address {text}, expected OWNER/NAME, as in claudiom4sir/StableVSR")
    marked = text.startswith(PREFIX)
    match = _NAME.fullmatch(text.removeprefix(PREFIX).removesuffix("/"))
    is_name = match is not None and _is_repo(match[1]) and ".." not in text
    if marked and not is_name:
        raise OptionsError(f"got {text!r}, expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    if match is None or not is_name or (not marked and (text.endswith(_FILES) or Path(text).exists())):
        return None
    return Name(match[1], match[2])


def _is_repo(repo: str) -> bool:
    return len(repo) <= MAX_LENGTH and "--" not in repo and not repo.endswith(".git")


@dataclass(frozen=True)
class Known:
    """A published model, for the list of `stablevsr models`."""

    repo: str
    purpose: str
    use: str  # how to use it


KNOWN = (
    Known(
        "claudiom4sir/StableVSR",
        "StableVSR (ECCV 2024), the model of the paper: best detail, 50 steps over the whole clip",
        "stablevsr upscale IN OUT --weights claudiom4sir/StableVSR",
    ),
    Known(
        "Jamichsu/Stream-DiffVSR",
        "Stream-DiffVSR: 4 steps a frame from past frames only, for streams and long clips",
        "stablevsr upscale IN OUT --weights Jamichsu/Stream-DiffVSR",
    ),
    Known(
        "stabilityai/stable-diffusion-x4-upscaler",
        "the SD x4 upscaler that StableVSR is built on: single images, and the base to train a TCM on",
        "stablevsr upscale IN.png OUT.png --weights stabilityai/stable-diffusion-x4-upscaler",
    ),
)
