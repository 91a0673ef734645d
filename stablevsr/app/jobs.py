"""The jobs of the app: one runs at a time, the others wait. Unfinished ones survive a restart of the app."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stablevsr.atomic import replacing
from stablevsr.engine.progress import OnProgress, Progress, Stopped
from stablevsr.errors import IncompleteOutput, OptionsError, UserError

log = logging.getLogger(__name__)

MAX_WAITING = 20
WINDOW = 10  # units of work whose time gives the pace
FINISHED = ("done", "failed")


@dataclass(frozen=True)
class Job:
    """A run that was asked for.

    state: waiting, running, stopping (after the unit of work in progress), stopped, failed, done.
    note: why it failed, or what is incomplete.
    warnings: the package's messages for the user in the last attempt.
    progress, seconds_left: of the phase that is running; None when unknown.
    """

    number: int
    input: str
    output: str
    frames: tuple[int, int] | None  # first, and one after the last; None for all
    config: dict[str, Any]  # of `SamplingConfig`, as JSON types
    codec: str | None = None
    start: float = 0.0  # seconds of the first frame in its clip, to show both in step
    state: str = "waiting"
    note: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0  # it has run, in all attempts
    progress: Progress | None = field(default=None, compare=False)
    seconds_left: float | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return Path(self.output).name

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without what is known only while it runs."""
        return {name: value for name, value in vars(self).items() if name not in ("progress", "seconds_left")}


class Pace:
    """Estimates the time left in a phase from its last units of work.

    The first unit is not counted: it may include compilation, or work that an earlier run did.
    """

    def __init__(self) -> None:
        self._phase: str | None = None
        self._times: deque[float] = deque(maxlen=WINDOW + 1)

    def seconds_left(self, progress: Progress, now: float) -> float | None:
        """Call after each unit of work. Returns None until two units have been timed."""
        if progress.phase != self._phase:
            self._phase = progress.phase
            self._times.clear()
        self._times.append(now)
        if len(self._times) < 3:
            return None
        a_unit = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return a_unit * (progress.total - progress.done)


class JobQueue:
    """Runs jobs one after the other in a thread of its own.

    Args:
        file: the list of jobs, kept here as JSON.
        work: does a job; may raise `Stopped`, when the callback returns False, and any other error.
        device: held while a job runs.
    """

    def __init__(self, file: Path, work: Callable[[Job, OnProgress], int], device: threading.Lock) -> None:
        self._file, self._work, self._device = file, work, device
        self._jobs = {job.number: job for job in _read(file)}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def all(self) -> list[Job]:
        """The jobs in the order in which they were submitted."""
        with self._changed:
            return list(self._jobs.values())

    def find(self, number: int | None) -> Job | None:
        with self._changed:
            return self._jobs.get(number) if number is not None else None

    def ahead_of(self, number: int) -> list[Job]:
        """The jobs that finish before this one starts."""
        return [job for job in self.all() if job.number < number and job.state in ("waiting", "running", "stopping")]

    def submit(self, **fields: Any) -> Job:
        """Add a job with these fields.

        Raises:
            OptionsError: when too many are waiting.
            OSError: when the list cannot be saved; nothing is added then.
        """
        with self._changed:
            waiting = sum(job.state == "waiting" for job in self._jobs.values())
            if waiting >= MAX_WAITING:
                raise OptionsError(f"{waiting} runs are waiting, expected at most {MAX_WAITING}: stop one, or wait")
            job = Job(number=max(self._jobs, default=0) + 1, **fields)
            self._jobs[job.number] = job
            try:
                self._save()
            except BaseException:
                del self._jobs[job.number]
                raise
            self._changed.notify_all()
            return job

    def stop(self, number: int) -> None:
        """Stop a job after its unit of work in progress; what is done is kept."""
        with self._changed:
            job = self._jobs[number]
            if job.state in ("waiting", "running"):
                self._set(replace(job, state="stopped" if job.state == "waiting" else "stopping"))

    def resume(self, number: int) -> None:
        """Let a stopped or failed job go on."""
        with self._changed:
            job = self._jobs[number]
            if job.state in ("stopped", "failed"):
                self._set(replace(job, state="waiting", note="", warnings=(), progress=None, seconds_left=None))

    def remove(self, number: int) -> None:
        """Forget a job that does not run and is not about to."""
        with self._changed:
            if self._jobs[number].state in ("stopped", *FINISHED):
                del self._jobs[number]
                self._try_to_save()

    def close(self) -> None:
        """Stop the job that runs, so that it can go on after a restart, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            with self._device:
                if self._start(job):
                    self._do(job)

    def _next(self) -> Job | None:
        """The first waiting job, once there is one; None when the queue is closing."""
        with self._changed:
            while not self._closing:
                for job in self._jobs.values():
                    if job.state == "waiting":
                        return job
                self._changed.wait()
            return None

    def _start(self, job: Job) -> bool:
        """Whether the job runs now: it may have been stopped while the device was busy."""
        with self._changed:
            if self._jobs.get(job.number) != job or self._closing:
                return False
            self._set(replace(job, state="running"))
            return True

    def _do(self, job: Job) -> None:
        start, pace = time.monotonic(), Pace()

        def progress(now: Progress) -> bool:
            left = pace.seconds_left(now, time.monotonic())
            with self._changed:
                job_now = replace(self._jobs[job.number], progress=now, seconds_left=left)
                self._jobs[job.number] = job_now  # not saved: only the state outlives the app
                return job_now.state == "running" and not self._closing

        state, note = "done", ""
        try:
            with _heard(lambda text: self._warn(job.number, text)):
                self._work(job, progress)
        except Stopped:
            state = "stopped"
        except IncompleteOutput as error:
            note = str(error)
        except UserError as error:
            state, note = "failed", str(error)
        except Exception as error:
            log.exception("a run failed")
            state, note = "failed", f"{type(error).__name__}: {error}"
        self._update(job.number, state=state, note=note, seconds=job.seconds + time.monotonic() - start)

    def _warn(self, number: int, text: str) -> None:
        with self._changed:
            job = self._jobs[number]
            self._set(replace(job, warnings=tuple(dict.fromkeys((*job.warnings, text)))))

    def _update(self, number: int, **fields: Any) -> None:
        with self._changed:
            self._set(replace(self._jobs[number], **fields))

    def _set(self, job: Job) -> None:
        self._jobs[job.number] = job
        self._try_to_save()
        self._changed.notify_all()

    def _try_to_save(self) -> None:
        """A run goes on where the list of runs finds no room: it is saved again at its next change."""
        try:
            self._save()
        except (OSError, UserError) as error:
            log.warning("the list of runs cannot be saved (%s): runs since then are lost if the app ends", error)

    def _save(self) -> None:
        with replacing(self._file) as part:
            part.write_text(json.dumps([job.to_dict() for job in self._jobs.values()], indent=1) + "\n")


@contextmanager
def _heard(hear: Callable[[str], None]) -> Iterator[None]:
    """Hand on the package's warnings of this thread."""
    thread, logger = threading.get_ident(), logging.getLogger("stablevsr")

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # Not what is said here: it would change the list, which may be what cannot be saved.
            if record.thread == thread and record.name != __name__:
                hear(record.getMessage())

    ear = Ear(logging.WARNING)
    logger.addHandler(ear)
    try:
        yield
    finally:
        logger.removeHandler(ear)


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job from JSON, which has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _read(file: Path) -> list[Job]:
    """The jobs of an earlier run of the app; those that were not finished are stopped.

    Raises:
        OptionsError: for a file that is damaged or not ours.
    """
    if not file.exists():
        return []
    try:
        jobs = [Job(**_fields(each)) for each in json.loads(file.read_text())]
    except (AttributeError, TypeError, ValueError) as error:
        raise OptionsError(
            f"{file}, the list of runs, is damaged or not of this version ({error}): move it away"
        ) from error
    return [job if job.state in FINISHED else replace(job, state="stopped") for job in jobs]
