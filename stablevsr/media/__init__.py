"""Frames in and out: videos, folders of images and single images as streams of RGB frames.

Stills go through imageio and Pillow, video through PyAV; nothing here knows about torch or the model. All bad input is
reported as `stablevsr.errors.UserError`, one sentence that names the path.

The names below are imported when they are first asked for, so that a command's help can list the codecs without
loading FFmpeg.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablevsr.media.codecs import CODECS, Encoding
    from stablevsr.media.frame import Frame, Reader, Writer
    from stablevsr.media.opening import open_reader, open_writer
    from stablevsr.media.part import PartReader
    from stablevsr.media.paths import check_output, natural_key, output_for

__all__ = [
    "CODECS",
    "Encoding",
    "Frame",
    "PartReader",
    "Reader",
    "Writer",
    "check_output",
    "natural_key",
    "open_reader",
    "open_writer",
    "output_for",
]

_HOMES = {
    "codecs": ("CODECS", "Encoding"),
    "frame": ("Frame", "Reader", "Writer"),
    "opening": ("open_reader", "open_writer"),
    "part": ("PartReader",),
    "paths": ("check_output", "natural_key", "output_for"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
