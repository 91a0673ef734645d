"""The video encoders on offer, and what the user chose."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Self

from stablevsr.errors import OptionsError


@dataclass(frozen=True)
class Codec:
    """An FFmpeg encoder with near-lossless defaults.

    encoder: FFmpeg's name.
    pix_fmt, deep_pix_fmt: pixel formats of its input; the second for sources of more than 8 bits a channel, if the
        codec distinguishes them.
    containers: file suffixes.
    crf: quality; lower is better and larger. None for encoders without one.
    """

    encoder: str
    pix_fmt: str
    containers: tuple[str, ...]
    crf: int | None
    largest_crf: int = 51
    options: dict[str, str] = field(default_factory=dict)
    deep_pix_fmt: str | None = None

    @property
    def says_aspect(self) -> bool:
        """Whether its own stream says what shape pixels have; for others the container must."""
        return self.encoder in ("libx264", "libx265")

    @property
    def is_deep(self) -> bool:
        """Whether it takes frames of 16 bits a channel."""
        return self.pix_fmt.endswith(("10le", "16le"))

    def for_source(self, is_deep: bool) -> Self:
        """The same codec at more than 8 bits a channel, if the source has them and the codec can keep them."""
        return replace(self, pix_fmt=self.deep_pix_fmt) if is_deep and self.deep_pix_fmt else self


_X265 = {"x265-params": "log-level=0"}
_HEVC_CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv")
CODECS = {
    "h264": Codec("libx264", "yuv420p", (".mp4", ".m4v", ".mov", ".mkv", ".avi"), 12, options={"preset": "medium"}),
    "hevc": Codec("libx265", "yuv420p", _HEVC_CONTAINERS, 14, options=_X265),
    "hevc10": Codec("libx265", "yuv420p10le", _HEVC_CONTAINERS, 14, options=_X265),
    "vp9": Codec(
        "libvpx-vp9", "yuv420p", (".webm", ".mkv", ".mp4"), 16, 63, {"b": "0", "row-mt": "1", "cpu-used": "2"}
    ),
    "av1": Codec(
        "libsvtav1", "yuv420p10le", (".mp4", ".mkv", ".webm"), 16, 63, {"preset": "6"}
    ),  # all decoders take 10 bits
    "prores": Codec("prores_ks", "yuv422p10le", (".mov", ".mkv"), None, options={"profile": "3"}),  # 422 HQ
    "ffv1": Codec("ffv1", "bgr0", (".mkv", ".avi"), None, deep_pix_fmt="gbrp16le"),  # lossless
}


@dataclass(frozen=True)
class Encoding:
    """The user's choice of codec and quality; None takes the container's default."""

    codec: str | None = None
    crf: int | None = None

    def choose(self, suffix: str) -> tuple[Codec, dict[str, str]]:
        """Return the codec for a container and its options. Raises OptionsError for combinations that do not work."""
        name = self.codec or ("vp9" if suffix == ".webm" else "h264")
        if name not in CODECS:
            raise OptionsError(f"codec {name} is unknown; use one of {', '.join(CODECS)}")
        codec = CODECS[name]
        if suffix not in codec.containers:
            raise OptionsError(f"{suffix} cannot hold {name} video; use {' or '.join(codec.containers)}")
        if self.crf is not None and codec.crf is None:
            kind = "is lossless" if name == "ffv1" else "has one quality"
            raise OptionsError(f"{name} {kind}, so a quality of {self.crf} means nothing; leave it out")
        crf = codec.crf if self.crf is None else self.crf
        if crf is None:
            return codec, codec.options
        if not 0 <= crf <= codec.largest_crf:
            raise OptionsError(f"quality {crf} is out of range; {name} takes 0 (best) to {codec.largest_crf}")
        return codec, {**codec.options, "crf": str(crf)}


def x264_params(*more: str) -> dict[str, str]:
    """The option `x264-params` with which the same frames give the same bits on every run, and with `more`.

    The AVX-512 code of x264's lookahead reads uninitialized memory: the same frames gave other bits in every other run.
    Its AVX2 code gives those that are right.
    """
    params = [*more, *(["asm=AVX2,FMA3,BMI2"] if _has_avx512() else [])]
    return {"x264-params": ":".join(params)} if params else {}


@cache
def _has_avx512() -> bool:
    """Whether this processor is known to have it, which only Linux tells."""
    try:
        return "avx512" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
