"""What kind of input or output a path is, the order of names, and whether an output may be written."""

import os
import re
from pathlib import Path
from typing import Literal

from stablevsr.errors import OptionsError, ResourceError
from stablevsr.media.animation_reader import is_animated

VIDEO_FORMATS = {  # suffix -> FFmpeg's name of the container; explicit because temporaries have no suffix
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

Kind = Literal["video", "image", "folder"]


def natural_key(name: str) -> tuple:
    """Sort key that compares runs of digits as numbers: frame9 comes before frame10."""
    parts = re.split(r"(\d+)", name)  # text, digits, text, ...: equal positions hold equal types
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], name


def output_for(source: Path, folder: Path) -> Path:
    """The output in `folder` for one of several inputs: the same name, in a format that can be written."""
    suffix = source.suffix.lower()
    if source.is_dir():
        return folder / source.resolve().name.replace(".", "_")  # a suffix would make it a file
    if suffix in VIDEO_FORMATS:
        return folder / source.name
    is_still = suffix in IMAGE_SUFFIXES and not is_animated(source)
    return folder / f"{source.stem}{'.png' if is_still else '.mp4'}"


def output_kind(path: str | Path) -> Kind:
    """The kind of output at `path`: a video, one image, or a folder of PNG files.

    Raises OptionsError for an unknown suffix.
    """
    suffix = Path(path).suffix.lower()
    if os.fspath(path).endswith(os.sep) or Path(path).is_dir() or not suffix:
        return "folder"
    if suffix in VIDEO_FORMATS:
        return "video"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    supported = " ".join([*VIDEO_FORMATS, *IMAGE_SUFFIXES])
    raise OptionsError(
        f"output {path} ends in {suffix}, which cannot be written; use one of {supported}, "
        "or a name without a suffix for a folder of PNG files"
    )


def check_output(path: str | Path, input_path: str | Path, force: bool) -> None:
    """Raise OptionsError, or ResourceError for a missing permission, unless `path` may be written; touches nothing.

    Refused are unknown suffixes, the input itself or a folder around it (also through links), a missing or unwritable
    parent folder and, without `force`, an existing file or a folder that is not empty.
    """
    if not os.fspath(path):
        raise OptionsError("the output has an empty name; give a video, an image or a folder")
    kind = output_kind(path)
    target, source = (Path(os.path.realpath(p)) for p in (path, input_path))  # Path.resolve fails for links in a circle
    if target.is_symlink():
        raise OptionsError(f"output {path} is a link that leads back to itself; remove it or choose another output")
    if target == source or (target.exists() and source.exists() and target.samefile(source)):
        raise OptionsError(f"output {path} is the input itself; choose another output")
    if source.is_relative_to(target):
        raise OptionsError(f"output {path} is a folder that holds the input {input_path}; choose another output")
    if not target.parent.is_dir():
        raise OptionsError(f"output {path} cannot be written because {target.parent} is not a folder; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"output {path} cannot be written because you have no permission to write in {target.parent}"
        )
    if target.exists():
        _check_existing(path, target, kind, force)


def _check_existing(path: str | Path, target: Path, kind: Kind, force: bool) -> None:
    if kind == "folder":
        if not target.is_dir():
            raise OptionsError(f"output {path} is a file, but a folder of PNG files would be written; choose another")
        if target.is_mount():
            raise OptionsError(f"output {path} is a mount point, which cannot be replaced; choose a folder inside it")
        if Path.cwd().is_relative_to(target):
            raise OptionsError(f"output {path} is the folder you are in; choose a new one")
        if any(target.iterdir()) and not force:
            raise OptionsError(f"output folder {path} is not empty; choose another or pass --force to replace it")
        foreign = [entry.name for entry in target.iterdir() if entry.suffix.lower() not in IMAGE_SUFFIXES]
        if foreign:
            raise OptionsError(
                f"output folder {path} holds {sorted(foreign)[0]}, which is no image and would be lost; "
                "choose another folder"
            )
    elif not target.is_file():
        raise OptionsError(f"output {path} exists and is not an ordinary file; choose another output")
    elif not force:
        raise OptionsError(f"output {path} exists already; choose another or pass --force to replace it")
