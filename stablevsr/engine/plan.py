"""The disk space and the time that a run needs, and the messages about them."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from stablevsr.engine.workspace import Workspace
from stablevsr.errors import ResourceError
from stablevsr.media import Encoding, Reader, Writer
from stablevsr.media.paths import output_kind

SPARE, MAX_SPARE = 0.05, 2 * 10**9  # fraction of the disk, and bytes, to leave free
SKIPPED, WATCHED = 2, 3  # frame-steps before timing, and frame-steps that are timed
WORTH_TELLING = 60.0  # seconds

# Upper bounds in bytes per pixel, reached by noise, which does not compress; tests hold all writers to them.
PER_SAMPLE = 1.02  # stills, per byte of a sample: incompressible data is stored as it is
LOSSLESS = 3.4  # FFV1 with 8 bits
LOSSY, LOSSY_AT_BEST = 0.9, 1.55  # other codecs at their default quality, and at --crf 0
OPTIONAL = frozenset({"flows", "pictures"})  # arrays that a run can do without
PER_FRAME, PER_FILE = 2_000, 20_000  # headers and indices, in bytes


@dataclass(frozen=True)
class Output:
    """An output and an upper bound on its disk space."""

    folder: Path  # its disk is the one used
    per_frame: int  # bytes
    once: int = PER_FILE  # bytes
    copies: int = 1  # that exist at the same time

    @classmethod
    def of(cls, writer: Writer, clip: Reader, encoding: Encoding | None, pixels: int, folder: Path) -> "Output":
        """The bounds for what `writer` writes for frames of this many pixels."""
        copied = clip.path.stat().st_size if clip.path.is_file() else 0  # upper bound on its sound and subtitles
        # The picture is joined with sound and subtitles in a second file.
        copies = 2 if output_kind(writer.path) == "video" else 1
        per_frame = int(bytes_a_pixel(writer, clip, encoding) * pixels) + PER_FRAME
        return cls(folder, per_frame, PER_FILE + copied, copies)

    def bytes(self, num_frames: int) -> int:
        return self.copies * self.per_frame * num_frames + self.once


def bytes_a_pixel(writer: Writer, clip: Reader, encoding: Encoding | None) -> float:
    """Upper bound on the bytes per pixel in the format that `writer` writes."""
    if output_kind(writer.path) != "video":
        channels = 4 if clip.has_alpha and writer.takes_alpha else 3
        return PER_SAMPLE * channels * (2 if writer.is_deep else 1)
    codec, options = (encoding or Encoding()).choose(writer.path.suffix.lower())
    if codec.encoder == "ffv1":
        return LOSSLESS * (2 if codec.for_source(clip.is_deep).is_deep else 1)
    return LOSSY if codec.crf is None or int(options["crf"]) >= codec.crf else LOSSY_AT_BEST


@dataclass(frozen=True)
class Plan:
    """The disk space that a run needs, and which of its optional arrays fit."""

    sizes: dict[str, int]  # bytes by array
    kept: frozenset[str]  # of OPTIONAL

    @classmethod
    def make(
        cls,
        workspace: Workspace,
        sizes: dict[str, int],
        new: bool,
        num_frames: int,
        outputs: list[Output],
        optional: frozenset[str] = OPTIONAL,
        later: int = 0,
    ) -> "Plan":
        """Keep the optional arrays that fit; `ResourceError` if not even the others do.

        Flows are deleted before pictures are written, so that each of the two is checked on its own.

        Args:
            sizes: from `Run.sizes`.
            new: decide now; otherwise the earlier decision holds, because an array may be half written.
            optional: of `OPTIONAL`, those that this run can do without.
            later: bytes that are needed on the same disk once this run is done.
        """
        known = None if new else workspace.noted("plan")
        if known is not None:
            return cls(sizes, frozenset(known["kept"]))
        workspace.drop("flows")  # left by a run killed before its first flow was saved; its space is free
        needed = sum(size for name, size in sizes.items() if name not in optional)
        left = require_room(workspace.folder, needed + later, num_frames, outputs)
        kept = sorted(name for name in OPTIONAL if name not in optional or sizes.get(name, left + 1) <= left)
        workspace.note("plan", {"kept": kept})
        return cls(sizes, frozenset(kept))

    def sentence(self, num_frames: int, frame_steps: int) -> str:
        """The plan as a message to the user."""
        needed = [f"{size(self.sizes[name])} for {name}" for name in self.sizes if name not in OPTIONAL - self.kept]
        text = f"{num_frames} frames, {frame_steps} frame-steps; temporary disk space: {', '.join(needed)}"
        if "flows" in self.sizes.keys() - self.kept:
            text += "; flows would not fit and are estimated when needed"
        if "pictures" not in self.kept:
            text += "; pictures would not fit, so the final decode starts over if it is interrupted"
        return text


def require_room(folder: Path, arrays: int, num_frames: int, outputs: list[Output]) -> int:
    """The space left on the disk of `folder` after all that must be written; `ResourceError` if a disk is too small."""
    needed = {folder.stat().st_dev: (folder, arrays)}  # by disk
    for output in outputs:
        first, so_far = needed.get(output.folder.stat().st_dev, (output.folder, 0))
        needed[output.folder.stat().st_dev] = first, so_far + output.bytes(num_frames)
    for place, most in needed.values():
        if most > room(place):
            raise ResourceError(
                f"{place} may need {size(most)} for {num_frames} frames, the disk has {size(room(place))} to spare: "
                "make room, or write the output to another disk"
            )
    return room(folder) - needed[folder.stat().st_dev][1]


def room(folder: Path) -> int:
    """How many bytes the disk of `folder` has to spare."""
    usage = shutil.disk_usage(folder)
    return max(0, usage.free - int(min(SPARE * usage.total, MAX_SPARE)))


def size(count: float) -> str:
    """A number of bytes, human-readable."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


class Clock:
    """Estimates the time of all frame-steps from a few, once.

    Skips two frame-steps: the first has no guidance, the second may include compilation.

    Args:
        left: the number of frame-steps to do.
        second_pass: as many of them take as long as a second pass of the model.
    """

    def __init__(self, left: int, second_pass: int = 0) -> None:
        self._left, self._second_pass, self._done, self._start = left, second_pass, 0, 0.0

    def after_a_step(self) -> str | None:
        """Call after every frame-step. Returns the time estimate once; None before that, or when it is short."""
        self._done += 1
        if self._done == SKIPPED:
            self._start = time.monotonic()
        if self._done != SKIPPED + WATCHED:
            return None
        a_step, left = (time.monotonic() - self._start) / WATCHED, self._left - self._done
        if a_step * (left + self._second_pass) < WORTH_TELLING:
            return None
        more = f", then {duration(a_step * self._second_pass)} for the second pass" if self._second_pass else ""
        return f"{duration(a_step * left)} for the {left} frame-steps left{more}"


def duration(seconds: float) -> str:
    """A human-readable duration, rounded as an estimate should be: "about 3 h 20 min"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"about {max(minutes, 1)} min"
    if minutes < 10 * 60:
        large, small, units = minutes // 60, minutes % 60 // 10 * 10, ("h", "min")
    elif hours < 48:
        return f"about {hours} h"
    else:
        large, small, units = hours // 24, hours % 24, ("days", "h")
    return f"about {large} {units[0]}" + (f" {small} {units[1]}" if small else "")
