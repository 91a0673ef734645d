"""Streaming a clip from a pipe or into one: nothing is stored, so the run cannot be continued."""

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from stablevsr.engine.outputs import Writers
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.stream import Stream
from stablevsr.errors import IncompleteOutput, InputError, UserError
from stablevsr.media import Frame, Reader
from stablevsr.sampling.pictures import PictureFormat, in_model_range


def upscale_pipe(stream: Stream, clip: Reader, writers: Writers, progress: OnProgress | None = None) -> int:
    """Upscale frames as they arrive; each is written before the next is requested.

    If the input fails on the way or Ctrl-C is pressed, the output keeps the frames that are done.

    Returns:
        The number of frames written.

    Raises:
        UserError: for overflow, and when the input fails before its first frame.
        IncompleteOutput: when it fails later, or at Ctrl-C; the caller finishes the output, then raises it again.
    """
    form, count = PictureFormat(torch.uint16 if writers.is_deep else torch.uint8), 0
    taken: list[Frame] = []  # the frame in progress

    def low_res() -> Iterator[Tensor]:
        with closing(iter(clip)) as frames:
            for frame in frames:
                taken[:] = [frame]
                yield in_model_range(torch.from_numpy(frame.image))

    try:
        for finished in stream.frames(low_res()):
            writers.write(stream.picture(finished, form), taken[0])
            count += 1
            report(progress, Progress("stream", count, max(count, clip.frame_count or 0)))
    except (UserError, KeyboardInterrupt) as error:
        if count == 0:
            raise
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else error
        raise IncompleteOutput(f"{reason}; {count} frames are written") from error
    if count == 0:
        raise InputError(f"{clip.path} has no frames, expected at least 1")
    return count
