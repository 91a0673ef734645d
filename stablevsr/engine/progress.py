"""Progress reports of a run."""

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a run is, within one phase."""

    phase: str  # "read", "flow", "denoise", "decode", "write"; in streaming mode "stream"
    done: int  # frames; pairs of frames in "flow", frame-steps in "denoise"
    total: int


class Stopped(Exception):
    """The progress callback returned False."""


# Called after each unit of work; returning False (not None) stops the run with `Stopped`.
OnProgress = Callable[[Progress], bool | None]


def report(callback: OnProgress | None, progress: Progress) -> None:
    """Call `callback`, if there is one; raises `Stopped` when it returns False."""
    if callback is not None and callback(progress) is False:
        raise Stopped(f"stopped in phase {progress.phase}, {progress.done} of {progress.total} done")
