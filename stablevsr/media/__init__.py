"""Frames in and out: videos, folders of images and single images as streams of RGB frames.

Stills go through imageio, video through PyAV; nothing here knows about torch or the model. All bad input is reported
as `stablevsr.errors.UserError`, one sentence that names the path.
"""

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
