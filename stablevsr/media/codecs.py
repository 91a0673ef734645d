"""The ways a video can be encoded."""

from dataclasses import dataclass, field

from stablevsr.errors import UserError


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg's with defaults that lose little."""

    encoder: str
    pix_fmt: str
    containers: tuple[str, ...]  # suffixes
    crf: int | None  # quality: lower is better and larger; None for lossless encoders
    largest_crf: int = 51
    options: dict[str, str] = field(default_factory=dict)

    @property
    def is_deep(self) -> bool:
        """Whether frames of 16 bits a channel are wanted."""
        return self.pix_fmt.endswith("10le")


CODECS = {
    "h264": Codec("libx264", "yuv420p", (".mp4", ".m4v", ".mov", ".mkv", ".avi"), 12, options={"preset": "medium"}),
    "hevc": Codec("libx265", "yuv420p", (".mp4", ".m4v", ".mov", ".mkv"), 14, options={"x265-params": "log-level=0"}),
    "hevc10": Codec(
        "libx265", "yuv420p10le", (".mp4", ".m4v", ".mov", ".mkv"), 14, options={"x265-params": "log-level=0"}
    ),
    "vp9": Codec(
        "libvpx-vp9", "yuv420p", (".webm", ".mkv", ".mp4"), 16, 63, {"b": "0", "row-mt": "1", "cpu-used": "2"}
    ),
    "ffv1": Codec("ffv1", "bgr0", (".mkv", ".avi"), None),  # lossless
}


@dataclass(frozen=True)
class Encoding:
    """What the user wishes; None leaves it to the container."""

    codec: str | None = None
    crf: int | None = None

    def choose(self, suffix: str) -> tuple[Codec, dict[str, str]]:
        """The codec for a container and its options; `UserError` for what does not go together."""
        name = self.codec or ("vp9" if suffix == ".webm" else "h264")
        if name not in CODECS:
            raise UserError(f"Codec {name} is unknown; use one of {', '.join(CODECS)}.")
        codec = CODECS[name]
        if suffix not in codec.containers:
            raise UserError(f"{suffix} cannot hold {name} video; use {' or '.join(codec.containers)}.")
        if self.crf is not None and codec.crf is None:
            raise UserError(f"{name} is lossless, so a quality of {self.crf} means nothing; leave it out.")
        crf = codec.crf if self.crf is None else self.crf
        if crf is None:
            return codec, codec.options
        if not 0 <= crf <= codec.largest_crf:
            raise UserError(f"Quality {crf} is out of range; {name} takes 0 (best) to {codec.largest_crf}.")
        return codec, {**codec.options, "crf": str(crf)}
