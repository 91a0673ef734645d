"""Storage for the arrays of a run: in memory, or on disk with prefetch and write-behind.

`Run` does not know which of the two it uses.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from stablevsr.engine.state import RunState
from stablevsr.engine.workspace import ArrayFile, Workspace
from stablevsr.runtime import to_device

SAVE_EVERY = 1.0  # seconds of work that a crash may cost
MAX_BEHIND = 16  # queued writes, at most, so that memory stays flat when the disk is slower than the networks


class Array(Protocol):
    """Tensors of one shape, by index."""

    def read(self, index: int) -> Tensor: ...

    def write(self, index: int, value: Tensor) -> None: ...

    def prefetch(self, index: int) -> None:
        """Announce that `index` will be read soon."""
        ...


class Store(Protocol):
    """The arrays and the state of a run."""

    slots: int  # per latent: 2 if the input of a step must outlive it

    def array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Array:
        """The array of that name, new or existing; values read are on `device`."""
        ...

    def keeps(self, name: str) -> bool:
        """Whether there is room for the array "flows" or "pictures"; if not, its values are computed on demand."""
        ...

    def drop(self, name: str) -> None:
        """Delete an array that is no longer needed."""
        ...

    def load(self) -> RunState: ...

    def save(self, state: RunState, now: bool = False) -> None:
        """Record that the units up to `state` are done; unless `now`, only from time to time."""
        ...


class MemoryArray:
    """Tensors in memory.

    Args:
        home: the device that stores values; None leaves them where they are.
        device: the device on which they are read.
    """

    def __init__(self, home: torch.device | None, device: torch.device) -> None:
        self._values: dict[int, Tensor] = {}
        self._home, self._device = home, device

    def read(self, index: int) -> Tensor:
        return to_device(self._values[index], self._device)

    def write(self, index: int, value: Tensor) -> None:
        self._values[index] = value if self._home is None else value.to(self._home)

    def prefetch(self, index: int) -> None:
        pass


class MemoryStore:
    """Arrays in memory, for a run that ends with the process."""

    slots = 1

    def __init__(self) -> None:
        self._arrays: dict[str, MemoryArray] = {}

    def hold(self, name: str, values: Tensor) -> MemoryArray:
        """A new array of the entries of a tensor."""
        array = self._arrays[name] = MemoryArray(None, values.device)
        for index, value in enumerate(values):
            array.write(index, value)
        return array

    def array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> MemoryArray:
        if name not in self._arrays:
            # Flows may be as large as pictures: too large for a GPU.
            self._arrays[name] = MemoryArray(torch.device("cpu") if name == "flows" else None, device)
        return self._arrays[name]

    def keeps(self, name: str) -> bool:
        return True

    def drop(self, name: str) -> None:
        self._arrays.pop(name, None)

    def load(self) -> RunState:
        return RunState()

    def save(self, state: RunState, now: bool = False) -> None:
        pass


class DiskStore:
    """Arrays in a `Workspace`, for a run that can be killed and continued; a thread of its own reads and writes them.

    The thread works in order. So a saved state reaches the disk after the arrays that it describes, and before the
    next frame-steps overwrite anything. After an error the thread writes nothing more, and the next call from the run
    raises the error.

    Args:
        device: where the run computes.

    Attributes:
        kept: the names for which `keeps` is true.
    """

    slots = 2

    def __init__(self, workspace: Workspace, device: torch.device) -> None:
        self._workspace, self._device = workspace, device
        self.kept: frozenset[str] = frozenset()
        self._arrays: dict[str, DiskArray] = {}
        self._worker = _Worker()
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.close(wait_for_errors=kind is None)

    def array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "DiskArray":
        if name not in self._arrays:
            self._arrays[name] = DiskArray(self._workspace.arrays(name, shape, dtype), self._worker, device)
        return self._arrays[name]

    def keeps(self, name: str) -> bool:
        return name in self.kept

    def drop(self, name: str) -> None:
        self._arrays.pop(name, None)
        self._worker.write(lambda: self._workspace.drop(name))

    def load(self) -> RunState:
        return self._workspace.state(self._device)

    def save(self, state: RunState, now: bool = False) -> None:
        if now or time.monotonic() - self._saved > SAVE_EVERY:
            self._worker.write(lambda: self._save(state))
            self._saved = time.monotonic()

    def later(self, task: Callable[[], object]) -> None:
        """Run another task in that thread, after all tasks before it."""
        self._worker.write(task)

    def flush(self) -> None:
        """Wait until everything is written; raises the error if that fails."""
        self._worker.flush()

    def _save(self, state: RunState) -> None:
        self._workspace.sync()  # first the arrays, then the record that they are done
        self._workspace.save_state(state)


class DiskArray:
    """An `ArrayFile` with prefetch and write-behind."""

    def __init__(self, file: ArrayFile, worker: "_Worker", device: torch.device) -> None:
        self._file, self._worker, self._device = file, worker, device
        self._behind: dict[int, Tensor] = {}  # not yet written
        self._ahead: dict[int, Future[Tensor]] = {}  # prefetched, not yet read

    def read(self, index: int) -> Tensor:
        waiting = self._behind.get(index)
        if waiting is not None:
            return to_device(waiting, self._device)
        self.prefetch(index)
        return self._ahead.pop(index).result()

    def write(self, index: int, value: Tensor) -> None:
        self._ahead.pop(index, None)
        self._behind[index] = value
        self._worker.write(lambda: self._put(index, value))

    def prefetch(self, index: int) -> None:
        if index in self._ahead:
            return
        waiting = self._behind.get(index)
        if waiting is None:
            self._ahead[index] = self._worker.read(lambda: to_device(self._file.read(index), self._device))
        else:  # kept here: it may be written, and gone from `_behind`, by the time it is read
            self._ahead[index] = Future()
            self._ahead[index].set_result(to_device(waiting, self._device))

    def _put(self, index: int, value: Tensor) -> None:
        self._file.write(index, value)  # waits for the device, in this thread
        if self._behind.get(index) is value:
            del self._behind[index]


class _Worker:
    """One thread that runs tasks in order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stablevsr-disk")
        self._writes: deque[Future[None]] = deque()
        self._failure: BaseException | None = None

    def read(self, task: Callable[[], Tensor]) -> "Future[Tensor]":
        return self._executor.submit(task)

    def write(self, task: Callable[[], object]) -> None:
        """Run a task later; raises the error of an earlier one."""
        while len(self._writes) >= MAX_BEHIND or (self._writes and self._writes[0].done()):
            self._writes.popleft().result()
        self._raise_failure()
        self._writes.append(self._executor.submit(self._guarded, task))

    def flush(self) -> None:
        while self._writes:
            self._writes.popleft().result()
        self._raise_failure()

    def close(self, wait_for_errors: bool) -> None:
        """Write everything and end the thread; raises the error of a failed write if `wait_for_errors`."""
        try:
            if wait_for_errors:
                self.flush()
        finally:
            self._executor.shutdown(wait=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _guarded(self, task: Callable[[], Any]) -> None:
        if self._failure is None:
            try:
                task()
            except BaseException as error:
                self._failure = error
