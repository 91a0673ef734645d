"""ICC profiles of stills: kept if the format can hold them, else the pixels are converted to sRGB."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

_TIFF_TAG, _TIFF_UNDEFINED = 34675, 7
_SPACE = slice(16, 20)  # the color space field of a profile


def read_profile(path: Path) -> bytes | None:
    """The ICC profile of an image file, None if there is none. Raises what Pillow raises for damaged files."""
    # Nothing is decoded here, so large images do no harm.
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), Image.open(path) as image:
        return image.info.get("icc_profile")


def is_gray(profile: bytes) -> bool:
    """Whether a profile is for gray, and so does not fit the RGB that gray images become here."""
    return profile[_SPACE] == b"GRAY"


def to_srgb(image: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert (h, w, 3), uint8 or uint16 (at 8-bit precision), from a profile's colors to sRGB.

    Returns the image unchanged if the profile does not apply to it.
    """
    deep = image.dtype == np.uint16
    pixels = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8) if deep else image
    gray = is_gray(profile)
    source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels))
    try:
        known = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = np.asarray(ImageCms.profileToProfile(source, known, target, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted.astype(np.uint16) * 257 if deep else converted


def with_png_profile(file: bytes, profile: bytes) -> bytes:
    """Insert a profile into a PNG file, after the header."""
    body = b"ICC profile\0\0" + zlib.compress(profile)
    chunk = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    end_of_header = 8 + 25  # signature; length, name, 13 bytes and checksum
    return file[:end_of_header] + chunk + file[end_of_header:]


def with_tiff_profile(file: bytes, profile: bytes) -> bytes:
    """Insert a profile into a little-endian TIFF file of one picture; its directory is rewritten at the end."""
    (start,) = struct.unpack_from("<I", file, 4)
    (count,) = struct.unpack_from("<H", file, start)
    entries = [file[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    file += b"\0" * (len(file) % 2)
    entries.append(struct.pack("<HHII", _TIFF_TAG, _TIFF_UNDEFINED, len(profile), len(file)))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    file += profile + b"\0" * (len(profile) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return file[:4] + struct.pack("<I", len(file)) + file[8:] + directory
