"""Ray's calls that `cluster` uses, on threads of this process: for tests of what happens when things fail."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from stablevsr.cluster.connect import Cluster, Connection
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.pieces import write_piece
from stablevsr.cluster.run_unit import Made, Order
from stablevsr.cluster.worker import Outcome, Place
from stablevsr.engine.progress import Progress


class RayError(Exception):
    """As Ray's."""


class RayActorError(RayError):
    """As Ray's."""


class RayTaskError(RayError):
    """As Ray's."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class GrayWorker:
    """As `Worker`, but its pictures are gray, and it does what `act` says when it is given a unit."""

    act: Callable[["GrayWorker", Order], None] = staticmethod(lambda worker, order: None)
    facts_of_others: ClassVar[dict[int, dict[str, str]]] = {}  # by number, where they differ
    has_shared_storage = True

    def __init__(self, description: ModelDescription, threads: int, number: int, killed: threading.Event) -> None:
        self.number, self.killed, self._description = number, killed, description
        self._data, self.received = b"", 0

    def place(self) -> Place:
        return Place(f"machine{self.number}", self.number)

    def facts(self) -> dict[str, str]:
        return self._description.facts() | self.facts_of_others.get(self.number, {})

    def build(self) -> Place:
        return self.place()

    def sees(self, folder: str, token: str) -> bool:
        return self.has_shared_storage

    def begin(self, order: Order) -> None:
        self.received = 0

    def take(self, order: Order, index: int, frames: np.ndarray) -> None:
        assert index == self.received
        self.received += len(frames)

    def run(self, order: Order, frames: str | None, piece: str | None, *turn: object) -> Outcome:
        type(self).act(self, order)
        height, width = order.size
        pictures = torch.full((order.unit.count, 4 * height, 4 * width, 3), 128, dtype=torch.uint8)
        if piece is None:
            assert self.received == order.unit.count
            self._data = b"not read by the driver" * order.unit.count
            return Outcome(Made("of another", 0.0), len(self._data))
        digest = write_piece(Path(piece), iter(pictures), is_deep=False)
        return Outcome(Made(digest, 0.0), Path(piece).stat().st_size)

    def read(self, order: Order, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def end(self, order: Order) -> None:
        self._data = b""

    def close(self) -> None:
        pass

    def progress(self) -> Progress | None:
        return None


class _Handle:
    def __init__(self, worker: Callable[..., Any], number: int, arguments: tuple) -> None:
        self.killed, self._threads = threading.Event(), ThreadPoolExecutor(2)
        self._worker = worker(*arguments, number, self.killed)

    def __getattr__(self, name: str) -> SimpleNamespace:
        def call(*arguments: object) -> Any:
            method = getattr(self._worker, name)
            values = [each[1].result() if _is_reference(each) else each for each in arguments]
            return self, self._threads.submit(method, *values)

        return SimpleNamespace(remote=call)


def _is_reference(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Future)


class FakeRay:
    """Stands in for the module `ray`.

    Args:
        worker: a `GrayWorker` class.
        slots: how many workers find room.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError)

    def __init__(self, worker: type[GrayWorker], slots: int = 99) -> None:
        self._worker, self.slots, self.started = worker, slots, 0
        self.handles: list[_Handle] = []

    def remote(self, actor: type) -> Any:
        def start(*arguments: object) -> _Handle:
            self.started += 1
            handle = _Handle(self._worker, self.started, arguments)
            self.handles.append(handle)
            return handle

        made = SimpleNamespace(remote=start)
        made.options = lambda **needs: made
        return made

    def wait(self, references: list[tuple[_Handle, Future]], timeout: float) -> tuple[list, list]:
        ((handle, future),) = references
        if self.handles.index(handle) >= self.slots:
            threading.Event().wait(timeout)
            return [], references
        wait([future], min(timeout, 0.05))
        return (references, []) if future.done() or handle.killed.is_set() else ([], references)

    def get(self, reference: tuple[_Handle, Future]) -> Any:
        handle, future = reference
        while not future.done() and not handle.killed.is_set():
            wait([future], 0.01)
        if handle.killed.is_set():
            raise RayActorError("The actor died")
        try:
            return future.result()
        except Exception as error:
            raise RayTaskError(error) from None

    def kill(self, handle: _Handle) -> None:
        handle.killed.set()

    def settle(self) -> None:
        """Wait for the threads of workers that were killed: threads cannot be."""
        for handle in self.handles:
            handle._threads.shutdown()

    def available_resources(self) -> dict[str, float]:
        return {"CPU": max(0, self.slots - len(self.handles))}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.slots}

    @contextmanager
    def connected(self, cluster: Cluster, description: ModelDescription) -> Iterator[Connection]:
        """In place of `connect.connected`."""
        assert cluster.workers is not None
        yield Connection(self, description, cluster.workers, 1)
