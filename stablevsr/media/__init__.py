"""Frames in and out: videos, folders of images and single images as streams of RGB frames.

Stills go through imageio, video through PyAV; nothing here knows about torch or the model. All bad input is reported
as `stablevsr.errors.UserError`, one sentence that names the path.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablevsr.media.codecs import CODECS, Encoding
    from stablevsr.media.frame import Frame, Reader, Writer
    from stablevsr.media.opening import open_reader, open_writer
    from stablevsr.media.part import PartReader
    from stablevsr.media.paths import check_output, natural_key, output_for

# Imported when asked for: the command's parser reads the list of codecs, and should not wait for PyAV.
_PLACES = {
    "CODECS": "codecs",
    "Encoding": "codecs",
    "Frame": "frame",
    "Reader": "frame",
    "Writer": "frame",
    "open_reader": "opening",
    "open_writer": "opening",
    "PartReader": "part",
    "check_output": "paths",
    "natural_key": "paths",
    "output_for": "paths",
}
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


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'stablevsr.media' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"stablevsr.media.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
