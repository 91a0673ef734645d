"""The workers of a Ray cluster, and the units that they work on."""

import heapq
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from stablevsr.atomic import replacing
from stablevsr.cluster.connect import Connection
from stablevsr.cluster.description import require_same
from stablevsr.cluster.job import Job
from stablevsr.cluster.pieces import Record, write_record
from stablevsr.cluster.run_unit import FrameFile, Order
from stablevsr.cluster.units import Unit
from stablevsr.cluster.worker import Outcome, Place, Worker
from stablevsr.engine.array_file import using
from stablevsr.engine.progress import Progress
from stablevsr.errors import ResourceError, UserError

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # of a unit, before it is given up; of a worker in a row, before it is
POLL = 0.5  # seconds between two looks at a unit's progress
NO_ROOM_AFTER = 60.0  # seconds without a free slot before that is said
CHUNK = 16 * 2**20  # bytes that travel at a time, so that no object store has to hold a clip


@dataclass(eq=False)
class Assignment:
    """A unit on its way."""

    job: Job
    unit: Unit
    failures: list[str] = field(default_factory=list)  # reasons
    done: int = 0  # frame-steps
    record: Record | None = None  # once it is finished
    is_given_up: bool = False

    @property
    def work(self) -> int:
        return self.job.order(self.unit).work

    def __str__(self) -> str:
        return f"{self.job.input}, {self.unit}"

    def note(self, progress: Progress | None) -> None:
        """Update `done`."""
        steps = self.job.setting.config.steps
        if progress is not None and progress.phase in ("denoise", "stream", "decode"):
            per_unit = {"denoise": 1, "stream": steps}.get(progress.phase)
            self.done = self.work if per_unit is None else per_unit * progress.done


class Pool:
    """Keeps every worker busy with the longest unit that waits; a thread for each talks to it.

    Finished and given-up units are put into `events`, and at the end None if no worker is left: `failure` says why.

    Args:
        facts: of the driver's machine, see `ModelDescription.facts`.
    """

    def __init__(self, connection: Connection, facts: dict[str, str]) -> None:
        self.events: SimpleQueue[Assignment | None] = SimpleQueue()
        self.failure: UserError | Exception | None = None
        self.finished = 0  # units
        self._connection, self._facts = connection, facts
        self._waiting: list[tuple[int, int, Assignment]] = []
        self._count = 0  # of assignments: equal ones stay in order
        self._changed = threading.Condition()
        self._is_over = False
        self._told = time.monotonic()
        self._seats = [_Seat(self, number) for number in range(1, connection.workers + 1)]
        self._left = len(self._seats)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_over(self) -> bool:
        return self._is_over

    def start(self) -> None:
        for seat in self._seats:
            seat.start()

    def add(self, assignment: Assignment) -> None:
        with self._changed:
            self._count += 1
            heapq.heappush(self._waiting, (-assignment.unit.count, self._count, assignment))
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Forget the units of a job that nobody has begun."""
        with self._changed:
            self._waiting = [each for each in self._waiting if each[-1].job is not job]
            heapq.heapify(self._waiting)

    def take(self) -> Assignment | None:
        """Wait for a unit; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            return None if self._is_over else heapq.heappop(self._waiting)[-1]

    def succeeded(self, assignment: Assignment, record: Record) -> None:
        self.finished += 1
        assignment.record, assignment.done = record, assignment.work
        self.events.put(assignment)

    def failed(self, assignment: Assignment, reason: str, is_final: bool = False) -> None:
        """Have the unit tried again by whoever is free next, or give it up."""
        if self._is_over:
            return
        assignment.failures.append(reason)
        if is_final or len(assignment.failures) >= MAX_FAILURES:
            assignment.is_given_up = True
            self.events.put(assignment)
        else:
            log.warning("%s: %s; it is tried again", assignment, reason)
            self.add(assignment)

    def leave(self, seat: "_Seat", error: Exception) -> None:
        """A worker ends because of an error: the others go on, unless it shows before the first unit is finished."""
        with self._changed:
            self._left -= 1
            is_early = self.finished == 0 and not seat.has_worked
            if self._left and not is_early and not self._is_over:
                log.warning("a worker takes no more work: %s", error)
            elif not self._is_over:
                self.failure = self.failure or error
                self.events.put(None)

    def tell_no_room(self) -> None:
        """Say, once a minute, that workers have no slot yet."""
        with self._changed:
            if time.monotonic() - self._told < NO_ROOM_AFTER or self._connection.has_room():
                return
            self._told = time.monotonic()
        missing = sum(not seat.is_placed for seat in self._seats)
        needs = self._connection.needs
        slot = "a GPU" if needs["num_gpus"] else f"{needs['num_cpus']} CPU cores"
        log.warning("the cluster has no free slot for %d workers, which need %s each: waiting", missing, slot)

    def stop(self) -> None:
        """Stop all workers at once, in the middle of what they do."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for seat in self._seats:
            seat.kill()
        for seat in self._seats:
            if seat.is_alive():
                seat.join(10.0)


class _Seat(threading.Thread):
    """A worker, replaced by a new one when it dies, and the conversation with it."""

    def __init__(self, pool: Pool, number: int) -> None:
        super().__init__(name=f"stablevsr-worker-{number}", daemon=True)
        self._pool, self._connection = pool, pool._connection
        self._ray, self._number = pool._connection.ray, number
        self._actor: Any = None
        self._place: Place | None = None
        self.has_worked = False

    @property
    def is_placed(self) -> bool:
        return self._place is not None

    def run(self) -> None:
        try:
            deaths = 0
            while deaths < MAX_FAILURES and not self._pool.is_over:
                if self._work():
                    deaths = 0
                deaths += 1
            if not self._pool.is_over:
                raise ResourceError(f"{self._place or 'a worker'} died {MAX_FAILURES} times in a row")
        except Exception as error:
            if not self._pool.is_over:
                self._pool.leave(self, error)
        finally:
            self.kill()

    def kill(self) -> None:
        handle = self._actor
        if handle is not None:
            self._ray.kill(handle)

    def _work(self) -> bool:
        """Start a worker and give it units until it dies; returns whether it finished any."""
        has_finished = False
        died = self._ray.exceptions.RayActorError
        try:
            self._begin()
        except died as error:
            self._refuse_unusable(error)
            return False
        while (assignment := self._pool.take()) is not None:
            start = time.monotonic()
            log.debug("worker %d on %s: %s", self._number, self._place, assignment)
            try:
                outcome = self._converse(assignment)
            except died:
                assignment.done = 0
                self._pool.failed(assignment, f"the worker on {self._place} died")
                return has_finished
            except self._ray.exceptions.RayTaskError as error:
                self._judge(assignment, error.cause)
                continue
            self._finish(assignment, outcome, time.monotonic() - start)
            has_finished = self.has_worked = True
        return has_finished

    def _begin(self) -> None:
        """Start a worker and compare it with this machine; waits for a slot."""
        needs, description = self._connection.needs, self._connection.description
        actor = self._ray.remote(Worker).options(max_concurrency=2, max_restarts=0, **needs)
        self._place = None
        self._actor = actor.remote(description, self._connection.cpus)
        place = self._place = self._answer(self._actor.place.remote(), self._pool.tell_no_room)
        try:
            require_same(self._pool._facts, self._answer(self._actor.facts.remote()), str(place))
            self._place = self._answer(self._actor.build.remote())
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise type(error.cause)(f"{place}: {error.cause}") from None
            raise ResourceError(f"{place} cannot build the model ({_text(error.cause)})") from None
        log.debug("worker %d is ready on %s", self._number, self._place)

    def _answer(self, reference: Any, while_waiting: Callable[[], object] = lambda: None) -> Any:
        """The result of a call, however long it takes."""
        while not self._ray.wait([reference], timeout=POLL)[0]:
            if self._pool.is_over:
                raise ResourceError("stopped")  # nobody hears it
            while_waiting()
        return self._ray.get(reference)

    def _refuse_unusable(self, error: Exception) -> None:
        """Raise if a worker cannot start because its machine lacks what it needs, where another try changes nothing."""
        text = str(error)
        if "ModuleNotFoundError" in text or "ImportError" in text:
            reason = next(line for line in text.splitlines()[::-1] if "Error" in line).strip()
            raise ResourceError(
                f"a machine of the cluster lacks a package ({reason}): install stablevsr there"
            ) from None

    def _judge(self, assignment: Assignment, cause: BaseException) -> None:
        """A unit failed, but its worker did not die."""
        if isinstance(cause, ResourceError):  # of this worker's machine
            self._pool.failed(assignment, f"{self._place}: {cause}")
            self.has_worked = True  # not a mistake in the set-up
            raise ResourceError(f"{self._place}: {cause}")
        self._pool.failed(assignment, f"{self._place}: {_text(cause)}", is_final=isinstance(cause, UserError))

    def _converse(self, assignment: Assignment) -> Outcome:
        """Have a unit sampled; afterwards its piece is in place."""
        job, unit, handle = assignment.job, assignment.unit, self._actor
        order, piece = job.order(unit), job.piece(unit)
        is_shared = self._ray.get(handle.sees.remote(str(job.workspace.folder), job.token))
        if not is_shared:
            self._send(job, order)
        paths = (str(job.frames_path), str(piece)) if is_shared else (None, None)
        reference = handle.run.remote(order, *paths)
        while not self._ray.wait([reference], timeout=POLL)[0]:
            assignment.note(self._ray.get(handle.progress.remote()))
        outcome: Outcome = self._ray.get(reference)
        if not is_shared:
            self._fetch(piece, outcome)
        return outcome

    def _send(self, job: Job, order: Order) -> None:
        """Send a unit's frames through the object store, a few at a time."""
        handle, unit = self._actor, order.unit
        self._ray.get(handle.begin.remote(order))
        file = FrameFile(job.frames_path, order, unit.first)
        try:
            per_chunk = max(1, CHUNK // (3 * order.size[0] * order.size[1] * order.frame_type.itemsize))
            for index in range(0, unit.count, per_chunk):
                chunk = range(index, min(index + per_chunk, unit.count))
                frames = np.stack([file.read(frame).numpy() for frame in chunk])
                self._ray.get(handle.take.remote(order, index, frames))
        finally:
            file.close()

    def _fetch(self, piece: Path, outcome: Outcome) -> None:
        """Fetch a piece from a worker that cannot write here."""
        with using(piece), replacing(piece) as part, part.open("wb") as file:
            for offset in range(0, outcome.size, CHUNK):
                file.write(self._ray.get(self._actor.read.remote(offset, CHUNK)))
        self._ray.get(self._actor.end.remote())

    def _finish(self, assignment: Assignment, outcome: Outcome, seconds: float) -> None:
        place = self._place
        assert place is not None
        record = Record(
            assignment.unit.count,
            outcome.made.digest,
            f"{place.machine}, process {place.process}",
            place.gpu,
            round(seconds, 3),
            outcome.made.sampling,
            len(assignment.failures),
            list(outcome.notices),
        )
        write_record(assignment.job.piece(assignment.unit), record)
        log.debug("worker %d on %s: finished %s in %.1f s", self._number, place, assignment, seconds)
        self._pool.succeeded(assignment, record)


def _text(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
