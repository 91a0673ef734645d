"""A file of tensors of one shape, and the sentence for a disk that fails."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevsr.atomic import sync
from stablevsr.errors import ResourceError, UserError

NUMPY = {torch.uint8: np.uint8, torch.uint16: np.uint16, torch.float32: np.float32}


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Turn disk errors into `UserError`, for work on `path` in the workspace."""
    try:
        yield
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
        raise ResourceError(
            f"{path}, part of the unfinished run, cannot be used ({error.strerror or error}): "
            f"{advice}, then run the same command again"
        ) from error


class ArrayFile:
    """A file of equally shaped arrays, read and written one at a time; grows by writing past its end.

    Raises UserError when the disk fails or is full.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, NUMPY[dtype]
        self.bytes = int(np.prod(shape)) * np.dtype(self.dtype).itemsize
        with using(path):
            path.touch()
            self._file = path.open("r+b")

    def read(self, index: int) -> Tensor:
        with using(self.path):
            data = self._get(index)
        if len(data) != self.bytes:
            raise UserError(f"{self.path} is shorter than expected: start again with --restart")
        return torch.from_numpy(np.frombuffer(bytearray(data), self.dtype).reshape(self.shape))

    def write(self, index: int, value: Tensor) -> None:
        with using(self.path):
            self._put(index, np.ascontiguousarray(value.cpu().numpy(), dtype=self.dtype).data)

    def sync(self) -> None:
        with using(self.path):
            sync(self.path)

    def close(self) -> None:
        with suppress(OSError):  # only of unflushed data, whose error was raised before
            self._file.close()

    def _get(self, index: int) -> bytes:
        self._file.seek(index * self.bytes)
        return self._file.read(self.bytes)

    def _put(self, index: int, data: memoryview) -> None:
        self._file.seek(index * self.bytes)
        self._file.write(data)
        self._file.flush()
