"""Frames written as a folder of PNG files, or as one image."""

import os
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np

from stablevsr.atomic import sync
from stablevsr.errors import UserError
from stablevsr.media.frame import Frame, Reader, Writer

_OPTIONS = {  # the best each lossy format can do
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
}
_DEEP = {  # FFmpeg's encoders for 16 bits a channel, which Pillow does not write in colour, and their order of bytes
    ".png": ("png", "be"),
    ".tif": ("tiff", "le"),
    ".tiff": ("tiff", "le"),
}
_WITH_ALPHA = (".png", ".tif", ".tiff", ".webp")


class FolderWriter(Writer):
    """A folder of PNG files named after the source's images, or frame_000001.png and so on for video."""

    takes_alpha = True

    def __init__(self, path: Path, source: Reader, height: int, width: int, part: Path | None = None) -> None:
        super().__init__(path, height, width, part)
        self.is_deep = source.is_deep
        with self._reporting():
            self._part.mkdir()

    def _write(self, image: np.ndarray, frame: Frame) -> None:
        name = frame.name or f"frame_{self._count + 1:06d}"
        with self._reporting():
            _save(self._part / f"{name}.png", ".png", image)

    def _finish(self) -> None:
        sync(self._part)


class ImageWriter(Writer):
    """One image in the format its suffix says; a second frame is refused with UserError."""

    def __init__(self, path: Path, source: Reader, height: int, width: int, part: Path | None = None) -> None:
        super().__init__(path, height, width, part)
        suffix = path.suffix.lower()
        self.is_deep, self.takes_alpha = source.is_deep and suffix in _DEEP, suffix in _WITH_ALPHA
        if source.is_deep and not self.is_deep:
            self.notices.append(f"{suffix} gets 8 bits a channel, though {source.path} has more; a .png keeps 16.")

    def _write(self, image: np.ndarray, frame: Frame) -> None:
        if self._count:
            raise UserError(f"{self.path} is a single image, but there is more than one frame; write to a folder.")
        with self._reporting():
            _save(self._part, self.path.suffix.lower(), image)

    def _finish(self) -> None:
        pass  # written and flushed with its only frame


def _save(file: Path, suffix: str, image: np.ndarray) -> None:
    with file.open("xb") as stream:  # "x": two frames of one name must not overwrite each other
        if image.dtype == np.uint16:
            stream.write(_encode_deep(image, *_DEEP[suffix]))
        else:
            iio.imwrite(stream, image, plugin="pillow", extension=suffix, **_OPTIONS.get(suffix, {}))
        stream.flush()
        os.fsync(stream.fileno())


def _encode_deep(image: np.ndarray, codec: str, order: str) -> bytes:
    form = "rgb48" if image.shape[2] == 3 else "rgba64"
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = form + order, Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=f"{form}le")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
