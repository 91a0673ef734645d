"""Reading a clip for streaming: each frame in a thread while the one before it is upscaled."""

from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from stablevsr.media import Frame
from stablevsr.runtime import to_device
from stablevsr.sampling.pictures import in_model_range


class ReadAhead:
    """LR frames of a clip, (3, h, w) float32 in [-1, 1], as `sampling.streaming.Peekable`; a context manager.

    A frame is read once the one before it is taken, so a finished frame goes out before the next but one is read. An
    error of the reader is raised where its frame would have come.

    Args:
        frames: used by one thread at a time.
        device: where the LR frames go.
        patience: seconds to wait, at the end, for a read in progress; None waits until it is done, as files need, which
            are closed next. A read from a pipe may never be done: it is left to its thread, which does not hold up the
            end of the process, and `Reader.__exit__` leaves open what it uses.

    Attributes:
        frame: the one taken last, as the reader gave it.
    """

    frame: Frame

    def __init__(self, frames: Iterator[Frame], device: torch.device, patience: float | None = None) -> None:
        self._frames, self._device, self._patience = frames, device, patience
        self._peeked: Tensor | None = None
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.join(self._patience)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        frame = self._coming.result()
        if frame is None:
            raise StopIteration
        low_res, self._peeked = self._low_res(frame) if self._peeked is None else self._peeked, None
        self.frame = frame
        self._read()
        return low_res

    def peek(self) -> Tensor | None:
        """The next frame if it has been read; None, without waiting, if not, or if there is none."""
        if self._peeked is None and self._coming.done() and self._coming.exception() is None:
            frame = self._coming.result()
            self._peeked = None if frame is None else self._low_res(frame)
        return self._peeked

    def _low_res(self, frame: Frame) -> Tensor:
        return to_device(in_model_range(torch.from_numpy(frame.image)), self._device)

    def _read(self) -> None:
        """Read the next frame in a thread; None at the end."""
        coming = self._coming = Future[Frame | None]()

        def read() -> None:
            try:
                coming.set_result(next(self._frames, None))
            except BaseException as error:
                coming.set_exception(error)

        self._thread = Thread(target=read, name="stablevsr-read", daemon=True)
        self._thread.start()
