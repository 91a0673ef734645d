"""Streaming a clip from a pipe or into one: nothing is stored, so the run cannot be continued."""

import torch

from stablevsr.engine.outputs import Writers
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.stream import Stream
from stablevsr.engine.stream_reader import ReadAhead
from stablevsr.errors import IncompleteOutput, InputError, UserError
from stablevsr.media import Reader
from stablevsr.media.pipe import PIPE
from stablevsr.sampling.pictures import PictureFormat

PATIENCE = 0.2  # seconds that a run which ends waits for more of a pipe


def upscale_pipe(stream: Stream, clip: Reader, writers: Writers, progress: OnProgress | None = None) -> int:
    """Upscale frames as they arrive; each is written before the next but one is requested.

    If the input fails on the way or Ctrl-C is pressed, the output keeps the frames that are done.

    Returns:
        The number of frames written.

    Raises:
        UserError: for overflow, and when the input fails before its first frame.
        IncompleteOutput: when it fails later, or at Ctrl-C; the caller finishes the output, then raises it again.
    """
    form, count = PictureFormat(torch.uint16 if writers.is_deep else torch.uint8), 0
    try:
        with ReadAhead(iter(clip), stream.device, PATIENCE if clip.path == PIPE else None) as low_res:
            for finished in stream.frames(low_res):
                writers.write(stream.picture(finished, form), low_res.frame)
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
