"""The workers of a Ray cluster, and the units that they work on."""

import logging
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from stablevsr.atomic import replacing
from stablevsr.cluster.assignment import Assignment, AtWork
from stablevsr.cluster.connect import Connection
from stablevsr.cluster.description import require_same
from stablevsr.cluster.job import Job
from stablevsr.cluster.pieces import Record, write_record
from stablevsr.cluster.run_unit import FrameFile, Made, Order
from stablevsr.cluster.worker import Outcome, Place, Worker
from stablevsr.engine.array_file import using
from stablevsr.errors import ResourceError, UserError

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # of a unit, before it is given up; of a worker in a row, before it is
POLL = 0.5  # seconds between two looks at a unit's progress
NO_ROOM_AFTER = 60.0  # seconds without a free slot before that is said
CLOSING = 2.0  # seconds for the workers to delete their files
CHUNK = 16 * 2**20  # bytes that travel at a time, so that no object store has to hold a clip


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
        self._numbers = count()  # of assignments: equal ones stay in order
        self._dropped: set[Job] = set()
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

    def at_work(self) -> list[AtWork]:
        """What every worker is doing."""
        return [seat.at_work() for seat in self._seats]

    def start(self) -> None:
        for seat in self._seats:
            seat.start()

    def add(self, assignment: Assignment) -> None:
        with self._changed:
            if not self._is_given_up(assignment):
                self._waiting.append((-assignment.length, next(self._numbers), assignment))
                self._changed.notify_all()

    def drop(self, job: Job) -> None:
        """Forget the units of a job that nobody works on."""
        with self._changed:
            self._dropped.add(job)
            self._forget()

    def take(self, seat: "_Seat") -> Assignment | None:
        """Wait for a unit that a worker can do; None when there will be none."""
        with self._changed:
            while not self._is_over:
                ready = [each for each in self._waiting if each[-1].home in (None, seat) and each[-1].is_ready]
                if ready:
                    chosen = min(ready)
                    self._waiting.remove(chosen)
                    return chosen[-1]
                self._changed.wait()
            return None

    def release(self, seat: "_Seat") -> None:
        """A worker is gone, and with it what only it had: others begin these segments again."""
        with self._changed:
            for _, _, assignment in self._waiting:
                if assignment.home is seat:
                    assignment.home = None
            self._changed.notify_all()

    def succeeded(self, assignment: Assignment, record: Record) -> None:
        self.finished += 1
        assignment.record, assignment.done = record, assignment.work
        self.events.put(assignment)

    def failed(self, assignment: Assignment, reason: str, is_final: bool = False) -> None:
        """Have the unit tried again by whoever is free next, or give it up, with all segments of its scene."""
        if self._is_over:
            return
        scene = assignment.scene
        assignment.failures.append(reason)
        assignment.home, assignment.done = None, assignment.passes * assignment.unit.count
        if scene is not None:
            scene.forget_references()
        if is_final or len(assignment.failures) >= MAX_FAILURES:
            with self._changed:
                assignment.is_given_up = True
                if scene is not None:
                    scene.is_given_up = True
                    self._forget()
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
        give_up = time.monotonic() + CLOSING
        for answer in [seat.close() for seat in self._seats if seat.is_placed]:
            self._connection.ray.wait([answer], timeout=max(0.0, give_up - time.monotonic()))
        for seat in self._seats:
            seat.kill()
        for seat in self._seats:
            if seat.is_alive():
                seat.join(10.0)

    def _is_given_up(self, assignment: Assignment) -> bool:
        return assignment.job in self._dropped or (assignment.scene is not None and assignment.scene.is_given_up)

    def _forget(self) -> None:
        self._waiting = [each for each in self._waiting if not self._is_given_up(each[-1])]


class _Seat(threading.Thread):
    """A worker, replaced by a new one when it dies, and the conversation with it."""

    def __init__(self, pool: Pool, number: int) -> None:
        super().__init__(name=f"stablevsr-worker-{number}", daemon=True)
        self._pool, self._connection = pool, pool._connection
        self._ray, self._number = pool._connection.ray, number
        self._actor: Any = None
        self._place: Place | None = None
        self._assignment: Assignment | None = None
        self.has_worked = False

    @property
    def is_placed(self) -> bool:
        return self._place is not None

    def at_work(self) -> AtWork:
        place, assignment = self._place, self._assignment
        machine = "no machine yet" if place is None else place.machine
        if assignment is None:
            return AtWork(self._number, machine)
        return AtWork(self._number, machine, assignment.title, assignment.done, assignment.work)

    def run(self) -> None:
        try:
            deaths = 0
            while deaths < MAX_FAILURES and not self._pool.is_over:
                if self._work():
                    deaths = 0
                deaths += 1
                self._pool.release(self)
            if not self._pool.is_over:
                raise ResourceError(f"{self._place or 'a worker'} died {MAX_FAILURES} times in a row")
        except Exception as error:
            if not self._pool.is_over:
                self._pool.release(self)
                self._pool.leave(self, error)
        finally:
            self.kill()

    def close(self) -> Any:
        """Have the worker delete what is its own; returns a reference to its answer."""
        return self._actor.close.remote()

    def kill(self) -> None:
        handle = self._actor
        if handle is not None:
            self._ray.kill(handle)

    def _work(self) -> bool:
        """Start a worker and give it units until it dies; returns whether it did anything well."""
        has_finished = False
        errors = self._ray.exceptions
        try:
            self._begin()
        except errors.RayActorError as error:
            self._refuse_unusable(error)
            return False
        except errors.RayError as error:
            raise ResourceError(f"the cluster cannot start a worker ({_text(error)})") from error
        while (assignment := self._pool.take(self)) is not None:
            log.debug("worker %d on %s: %s", self._number, self._place, assignment)
            self._assignment = assignment
            try:
                self._do(assignment)
            except errors.RayTaskError as error:
                self._judge(assignment, error.cause)
            except errors.RayError as error:
                is_death = isinstance(error, errors.RayActorError)
                reason = f"the worker on {self._place} died" if is_death else f"{self._place}: {_text(error)}"
                self._pool.failed(assignment, reason)
                self.kill()
                return has_finished
            except Exception as error:  # of this machine
                self._pool.failed(assignment, _text(error))
                raise
            else:
                has_finished = self.has_worked = True
            finally:
                self._assignment = None
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
        self._actor.end.remote(assignment.job.order(assignment.unit))
        if isinstance(cause, ResourceError):  # of this worker's machine
            self._pool.failed(assignment, f"{self._place}: {cause}")
            self.has_worked = True  # not a mistake in the set-up
            raise ResourceError(f"{self._place}: {cause}")
        is_final = isinstance(cause, UserError)
        reason = str(cause) if is_final else _text(cause)
        self._pool.failed(assignment, f"{self._place}: {reason}", is_final)

    def _do(self, assignment: Assignment) -> None:
        """Have a unit sampled; afterwards its piece is in place, or that of a segment is a pass nearer."""
        job, unit, handle, start = assignment.job, assignment.unit, self._actor, time.monotonic()
        order, piece, scene = job.order(unit), job.piece(unit), assignment.scene
        is_shared = self._ray.get(handle.sees.remote(str(job.workspace.folder), job.token))
        if not is_shared and assignment.home is not self:
            self._send(job, order)
        paths = (str(job.frames_path), str(piece)) if is_shared else (None, None)
        turn = () if scene is None else (assignment.passes, scene.border(unit, assignment.passes))
        reference = handle.run.remote(order, *paths, *turn)
        while not self._ray.wait([reference], timeout=POLL)[0]:
            assignment.note(self._ray.get(handle.progress.remote()))
        outcome: Outcome = self._ray.get(reference)
        if outcome.made is not None and not is_shared:
            self._fetch(order, piece, outcome)
        assignment.seconds += time.monotonic() - start
        assignment.sampling += outcome.sampling
        assignment.notices |= dict.fromkeys(outcome.notices)
        if outcome.made is not None:
            self._finish(assignment, outcome.made)
        else:
            assignment.home = None if is_shared else self
            self._pass_on(assignment, outcome.passes)

    def _pass_on(self, assignment: Assignment, passes: int) -> None:
        """Keep what a pass of a segment leaves for its neighbor, and have the next one done."""
        unit, scene = assignment.unit, assignment.scene
        assert scene is not None
        if passes > 0 and unit.given(passes - 1) is not None:
            reference = self._actor.given.remote()
            scene.keep(unit, passes - 1, reference, self._ray.get(reference))
        assignment.passes, assignment.done = passes, passes * unit.count
        self._pool.add(assignment)

    def _send(self, job: Job, order: Order) -> None:
        """Send a unit's frames through the object store, a few at a time."""
        handle, unit = self._actor, order.unit
        self._ray.get(handle.begin.remote(order))
        file = FrameFile(job.frames_path, order, unit.first)
        try:
            per_chunk = max(1, CHUNK // (3 * order.size[0] * order.size[1] * order.frame_type.itemsize))
            last = unit.count + unit.after
            for index in range(-unit.before, last, per_chunk):
                chunk = range(index, min(index + per_chunk, last))
                frames = np.stack([file.read(frame).numpy() for frame in chunk])
                self._ray.get(handle.take.remote(order, index, frames))
        finally:
            file.close()

    def _fetch(self, order: Order, piece: Path, outcome: Outcome) -> None:
        """Fetch a piece from a worker that cannot write here."""
        with using(piece), replacing(piece) as part, part.open("wb") as file:
            for offset in range(0, outcome.size, CHUNK):
                file.write(self._ray.get(self._actor.read.remote(order, offset, CHUNK)))
        self._ray.get(self._actor.end.remote(order))

    def _finish(self, assignment: Assignment, made: Made) -> None:
        place = self._place
        assert place is not None
        record = Record(
            assignment.unit.count,
            made.digest,
            f"{place.machine}, process {place.process}",
            place.gpu,
            round(assignment.seconds, 3),
            round(assignment.sampling, 3),
            len(assignment.failures),
            list(assignment.notices),
        )
        write_record(assignment.job.piece(assignment.unit), record)
        log.debug("worker %d on %s: finished %s in %.1f s", self._number, place, assignment, assignment.seconds)
        if assignment.scene is not None:
            assignment.scene.finish_if_complete()
        self._pool.succeeded(assignment, record)


def _text(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
