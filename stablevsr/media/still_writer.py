"""Writes frames as a folder of PNG files or as one image."""

import errno
import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np

from stablevsr.atomic import hidden_sibling, remove, sync
from stablevsr.errors import OptionsError
from stablevsr.media.frame import Frame, Reader, Writer
from stablevsr.media.profiles import to_srgb, with_png_profile, with_tiff_profile

_OPTIONS: dict[str, dict[str, Any]] = {  # the best quality of each lossy format
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
}
_DEEP = {  # FFmpeg's encoders and byte order for 16 bits a channel; Pillow writes those only in gray
    ".png": ("png", "be"),
    ".tif": ("tiff", "le"),
    ".tiff": ("tiff", "le"),
}
_WITH_PROFILE = {  # adds the profile that FFmpeg's encoders leave out
    "png": with_png_profile,
    "tiff": with_tiff_profile,
}
_WITHOUT_PROFILE = (".bmp",)
_MAX_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # pixels
_WITH_ALPHA = (".png", ".tif", ".tiff", ".webp")


class FolderWriter(Writer):
    """A folder of PNG files, named after the source's images or, for video, frame_000001.png and so on."""

    takes_alpha = True

    def __init__(self, path: Path, source: Reader, height: int, width: int, part: Path | None = None) -> None:
        super().__init__(path, height, width, part)
        self.is_deep = source.is_deep
        self._keeps = False
        with self._reporting():
            self._part.mkdir()

    def keep(self, folder: Path) -> int:
        remove(self._part)
        self._part, self._keeps = folder, True
        with self._reporting():
            folder.mkdir(exist_ok=True)
            for unfinished in folder.glob(".*"):
                remove(unfinished)
            self._count = len(list(folder.iterdir()))
        return self._count

    def _write(self, image: np.ndarray, frame: Frame) -> None:
        file = self._part / f"{frame.name or f'frame_{self._count + 1:06d}'}.png"
        with self._reporting():
            if file.exists():  # two frames of one name must not overwrite each other
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            unfinished = hidden_sibling(file)
            _save(unfinished, ".png", image, frame.profile)
            os.replace(unfinished, file)

    def _finish(self) -> None:
        sync(self._part)

    def _abandon(self) -> None:
        if not self._keeps:
            super()._abandon()


class ImageWriter(Writer):
    """One image in the format of its suffix; a second frame raises OptionsError."""

    def __init__(self, path: Path, source: Reader, height: int, width: int, part: Path | None = None) -> None:
        super().__init__(path, height, width, part)
        suffix = path.suffix.lower()
        longest = _MAX_SIDE.get(suffix)
        if longest and max(height, width) > longest:
            raise OptionsError(
                f"{path} would be {width}x{height}, but {suffix} holds at most {longest} pixels a side; "
                "write a .png or .tif"
            )
        self.is_deep, self.takes_alpha = source.is_deep and suffix in _DEEP, suffix in _WITH_ALPHA
        if source.is_deep and not self.is_deep:
            self.notices.append(f"{suffix} gets 8 bits a channel, though {source.path} has more; a .png keeps 16")

    def _write(self, image: np.ndarray, frame: Frame) -> None:
        if self._count:
            raise OptionsError(f"{self.path} is a single image, but there is more than one frame; write to a folder")
        with self._reporting():
            _save(self._part, self.path.suffix.lower(), image, frame.profile)

    def _finish(self) -> None:
        pass  # done with the only frame


def _save(file: Path, suffix: str, image: np.ndarray, profile: bytes | None) -> None:
    if profile and suffix in _WITHOUT_PROFILE:
        image, profile = to_srgb(image, profile), None
    with file.open("xb") as stream:
        stream.write(
            _encode_deep(image, *_DEEP[suffix], profile)
            if image.dtype == np.uint16
            else _encode(image, suffix, profile)
        )
    sync(file)


def _encode(image: np.ndarray, suffix: str, profile: bytes | None) -> bytes:
    options = {**_OPTIONS.get(suffix, {}), **({"icc_profile": profile} if profile else {})}
    encoded = io.BytesIO()
    iio.imwrite(encoded, image, plugin="pillow", extension=suffix, **options)
    return encoded.getvalue()


def _encode_deep(image: np.ndarray, codec: str, order: str, profile: bytes | None) -> bytes:
    form = "rgb48" if image.shape[2] == 3 else "rgba64"
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = form + order, Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=f"{form}le")
    encoded = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    return _WITH_PROFILE[codec](encoded, profile) if profile else encoded
