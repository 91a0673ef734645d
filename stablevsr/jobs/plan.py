"""What a run needs, of disk and of time, in words for the person who waits."""

import math
import shutil
import time
from dataclasses import dataclass

from stablevsr.config import SCALE
from stablevsr.errors import UserError
from stablevsr.jobs.workspace import Workspace

SPARE = 0.05  # of the disk, left free
SKIPPED, WATCHED = 2, 3  # frame-steps before, and those by which the time is judged
WORTH_TELLING = 60.0  # seconds


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    num_frames: int
    latents: int  # bytes on disk
    flows: int  # bytes on disk, were they kept
    keeps_flows: bool

    @classmethod
    def make(
        cls, workspace: Workspace, num_frames: int, shape: tuple[int, int, int], keeps_x0: bool, new: bool
    ) -> "Plan":
        """Keep the flows on disk if they fit there; `UserError` when even the latents do not."""
        channels, height, width = shape
        latents = 2 * 4 * num_frames * channels * height * width * (2 if keeps_x0 else 1)
        flows = 4 * 4 * (num_frames - 1) * SCALE**2 * height * width
        if not new:
            return cls(num_frames, latents, flows, (workspace.folder / "flows.raw").exists())
        usage = shutil.disk_usage(workspace.folder)
        room = usage.free - SPARE * usage.total
        output = 3 * num_frames * SCALE**2 * height * width // 4  # a generous guess for what an encoder makes of it
        if latents + output > room:
            raise UserError(
                f"{workspace.folder} needs {size(latents + output)} for {num_frames} frames, the disk has {size(room)} "
                "to spare: make room, or write the output to another disk"
            )
        return cls(num_frames, latents, flows, latents + output + flows <= room)

    def sentence(self, steps: int) -> str:
        """The plan, for the person who waits."""
        flows = (
            f", {size(self.flows)} for flows" if self.keeps_flows else "; flows would not fit and are estimated anew"
        )
        return (
            f"{self.num_frames} frames, {self.num_frames * steps} frame-steps; "
            f"on disk meanwhile: {size(self.latents)} for latents{flows}"
        )


def size(count: float) -> str:
    """A number of bytes, readable."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


class Clock:
    """Judges the time of all frame-steps by a few, once.

    Not by the very first: the one has no neighbour and is fast, the next may wait for a compiler.

    Args:
        left: how many frame-steps there are.
    """

    def __init__(self, left: int) -> None:
        self._left, self._done, self._start = left, 0, 0.0

    def after_a_step(self) -> str | None:
        """To be called behind each frame-step; the sentence, when it is time for it and the wait is worth it."""
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
