"""Progress reports of a run."""

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a run is, within one phase."""

    phase: str  # "read", "flow", "denoise", "decode", "write"; in streaming mode "stream"
    done: int  # frames; pairs of frames in "flow", frame-steps in "denoise"
    total: int
    model_pass: int = 1  # of `model_passes`: for more than four times the size, the model runs twice
    model_passes: int = 1


class Stopped(Exception):
    """The progress callback returned False."""


# Called after each unit of work; returning False (not None) stops the run with `Stopped`.
OnProgress = Callable[[Progress], bool | None]


def in_pass(callback: OnProgress | None, model_pass: int, model_passes: int) -> OnProgress | None:
    """A callback that tells `callback` in which pass of the model the work is done."""
    if callback is None:
        return None
    return lambda progress: callback(progress._replace(model_pass=model_pass, model_passes=model_passes))


def report(callback: OnProgress | None, progress: Progress) -> None:
    """Call `callback`, if there is one; raises `Stopped` when it returns False."""
    if callback is not None and callback(progress) is False:
        raise Stopped(f"stopped in phase {progress.phase}, {progress.done} of {progress.total} done")
