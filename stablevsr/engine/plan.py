"""What a run needs, of disk and of time, in words for the person who waits."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from stablevsr.engine.workspace import Workspace
from stablevsr.errors import UserError
from stablevsr.media import Encoding, Reader, Writer
from stablevsr.media.paths import output_kind

SPARE, MAX_SPARE = 0.05, 2 * 10**9  # of the disk, and bytes: what is left free
SKIPPED, WATCHED = 2, 3  # frame-steps before, and those by which the time is judged
WORTH_TELLING = 60.0  # seconds

# Upper bounds in bytes a pixel: what noise takes, which nothing compresses; tests hold all writers to them.
PER_SAMPLE = 1.02  # stills, for each byte of a sample: what cannot be compressed is stored as it is
LOSSLESS = 3.4  # FFV1 with 8 bits
LOSSY, LOSSY_AT_BEST = 0.9, 1.55  # other codecs at their usual quality, and at --crf 0
OPTIONAL = frozenset({"flows", "pictures"})  # arrays that a run can do without
PER_FRAME, PER_FILE = 2_000, 20_000  # headers and indices, in bytes


@dataclass(frozen=True)
class Output:
    """An output and the most that it can need of a disk."""

    folder: Path  # on whose disk
    per_frame: int  # bytes
    once: int = PER_FILE  # bytes
    copies: int = 1  # that are there at a time

    @classmethod
    def of(cls, writer: Writer, clip: Reader, encoding: Encoding | None, pixels: int, folder: Path) -> "Output":
        """The bounds for what `writer` makes of frames with so many pixels."""
        copied = clip.path.stat().st_size if clip.path.is_file() else 0  # at most: its sound and subtitles
        # The picture is joined with sound and subtitles in a second file.
        copies = 2 if output_kind(writer.path) == "video" else 1
        per_frame = int(bytes_a_pixel(writer, clip, encoding) * pixels) + PER_FRAME
        return cls(folder, per_frame, PER_FILE + copied, copies)

    def bytes(self, num_frames: int) -> int:
        return self.copies * self.per_frame * num_frames + self.once


def bytes_a_pixel(writer: Writer, clip: Reader, encoding: Encoding | None) -> float:
    """The most that a pixel takes in the format that `writer` writes."""
    if output_kind(writer.path) != "video":
        channels = 4 if clip.has_alpha and writer.takes_alpha else 3
        return PER_SAMPLE * channels * (2 if writer.is_deep else 1)
    codec, options = (encoding or Encoding()).choose(writer.path.suffix.lower())
    if codec.encoder == "ffv1":
        return LOSSLESS * (2 if codec.for_source(clip.is_deep).is_deep else 1)
    return LOSSY if codec.crf is None or int(options["crf"]) >= codec.crf else LOSSY_AT_BEST


@dataclass(frozen=True)
class Plan:
    """What a run needs of the disk, and which of its arrays there is room for."""

    sizes: dict[str, int]  # bytes by array
    kept: frozenset[str]  # of OPTIONAL

    @classmethod
    def make(
        cls, workspace: Workspace, sizes: dict[str, int], new: bool, num_frames: int, outputs: list[Output]
    ) -> "Plan":
        """Keep what fits; `UserError` when not even the rest does.

        Flows go before the pictures come, so that each of them needs room of its own only.

        Args:
            sizes: from `Run.sizes`.
            new: decide; else what was decided before holds, for an array may be half written.
        """
        known = None if new else workspace.noted("plan")
        if known is not None:
            return cls(sizes, frozenset(known["kept"]))
        workspace.drop("flows")  # of a run killed before its first flow was safe: it counts as room
        needed = sum(size for name, size in sizes.items() if name not in OPTIONAL)
        left = require_room(workspace.folder, needed, num_frames, outputs)
        kept = sorted(name for name in OPTIONAL if sizes.get(name, left + 1) <= left)
        workspace.note("plan", {"kept": kept})
        return cls(sizes, frozenset(kept))

    def sentence(self, num_frames: int, frame_steps: int) -> str:
        """The plan, for the person who waits."""
        needed = [f"{size(self.sizes[name])} for {name}" for name in self.sizes if name not in OPTIONAL - self.kept]
        text = f"{num_frames} frames, {frame_steps} frame-steps; on disk meanwhile: {', '.join(needed)}"
        if "flows" in self.sizes.keys() - self.kept:
            text += "; flows would not fit and are estimated when needed"
        if "pictures" not in self.kept:
            text += "; pictures would not fit, so that the final decode starts over if it is interrupted"
        return text


def require_room(folder: Path, arrays: int, num_frames: int, outputs: list[Output]) -> int:
    """What is left on the disk of `folder` with everything that must be written; `UserError` when it is too small."""
    needed = {folder.stat().st_dev: (folder, arrays)}  # by disk
    for output in outputs:
        first, so_far = needed.get(output.folder.stat().st_dev, (output.folder, 0))
        needed[output.folder.stat().st_dev] = first, so_far + output.bytes(num_frames)
    for place, most in needed.values():
        if most > room(place):
            raise UserError(
                f"{place} may need {size(most)} for {num_frames} frames, the disk has {size(room(place))} to spare: "
                "make room, or write the output to another disk"
            )
    return room(folder) - needed[folder.stat().st_dev][1]


def room(folder: Path) -> int:
    """How many bytes the disk of `folder` has to spare."""
    usage = shutil.disk_usage(folder)
    return max(0, usage.free - int(min(SPARE * usage.total, MAX_SPARE)))


def size(count: float) -> str:
    """A number of bytes, readable."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


class Clock:
    """Judges the time of all frame-steps by a few, once.

    Skips two frame-steps: the first has no guidance, the second may include compilation.

    Args:
        left: how many frame-steps there are.
    """

    def __init__(self, left: int) -> None:
        self._left, self._done, self._start = left, 0, 0.0

    def after_a_step(self) -> str | None:
        """Call after every frame-step. Returns the time estimate once; None before that, or when it is short."""
        self._done += 1
        if self._done == SKIPPED:
            self._start = time.monotonic()
        if self._done != SKIPPED + WATCHED:
            return None
        seconds = (time.monotonic() - self._start) / WATCHED * (self._left - self._done)
        if seconds < WORTH_TELLING:
            return None
        return f"{duration(seconds)} for the {self._left - self._done} frame-steps left"


def duration(seconds: float) -> str:
    """A time, readable and no more exact than it can be known: "about 3 h 20 min"."""
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
