"""Upscaling clips on a Ray cluster: reads them, hands their scenes out, and joins the finished pictures."""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty

from stablevsr.cluster.assignment import Assignment, AtWork, Scene
from stablevsr.cluster.connect import Cluster, connected
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.job import Job, Result, Setting, open_job
from stablevsr.cluster.ray_pool import Pool
from stablevsr.cluster.units import Unit, scenes_of
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.errors import UserError

log = logging.getLogger(__name__)

AHEAD = 8  # units for each worker that wait at most: then no more clips are read
WAIT = 0.5  # seconds for news


def run_on_cluster(
    clips: Sequence[tuple[Path, Path]],
    description: ModelDescription,
    setting: Setting,
    cluster: Cluster | None = None,
    *,
    side_by_side: Path | None = None,
    progress: OnProgress | None = None,
    watch: Callable[[list[AtWork]], object] | None = None,
) -> list[Result]:
    """Upscale clips on a Ray cluster. Each result has the bits that one process would give it.

    A clip that cannot be read, and a scene that fails, do not stop the others; both are in the results. What was
    finished is kept beside the outputs, so that the same call continues.

    Args:
        clips: inputs and outputs.
        description: the model that each worker builds.
        cluster: None is a new one on this machine.
        side_by_side: a second output of the only clip.
        progress: called with frame-steps of all clips that have been read so far; return False to stop.
        watch: called with what every worker is doing, as often as that may have changed.

    Raises:
        UserError: for options that do not work, and when no worker can be used; for an only clip that cannot be read.
        Stopped: when `progress` returned False.
    """
    with connected(cluster or Cluster(), description) as connection:
        facts = connection.description.facts()
        setting = replace(setting, machine=facts)
        pool = Pool(connection, facts)
        with ExitStack() as stack:
            driver = _Driver(clips, setting, pool, side_by_side, progress, connection.workers, watch)
            stack.callback(driver.close)
            stack.callback(pool.stop)
            pool.start()
            return driver.run()


@dataclass(eq=False)
class _Clip:
    """A clip that is being worked on."""

    number: int
    job: Job
    stack: ExitStack  # closes the job
    assignments: dict[Unit, Assignment]
    left: set[Unit]  # not finished, nor given up
    start: float = field(default_factory=time.monotonic)
    joining: Generator[Unit, None, None] | None = None
    wanted: Unit | None = None  # the unit whose pictures are to be written next

    @property
    def has_failed(self) -> bool:
        return any(each.is_given_up for each in self.assignments.values())

    def has(self, unit: Unit | None) -> bool:
        """Whether the pictures of a unit are there."""
        return unit is not None and unit not in self.left and self.assignments[unit].record is not None


class _Driver:
    """Reads clips as far ahead as the workers need, and joins what they have finished; one thing at a time."""

    def __init__(
        self,
        clips: Sequence[tuple[Path, Path]],
        setting: Setting,
        pool: Pool,
        side_by_side: Path | None,
        progress: OnProgress | None,
        workers: int,
        watch: Callable[[list[AtWork]], object] | None,
    ) -> None:
        self._setting, self._pool, self._side_by_side, self._progress = setting, pool, side_by_side, progress
        self._watch = watch
        self._results = [Result(*clip) for clip in clips]
        self._next = 0  # number of the clip to be read next
        self._workers, self._ahead = workers, AHEAD * workers
        self._clips: list[_Clip] = []  # that are being worked on
        self._done = 0  # frame-steps of the others
        self._told: set[str] = set()  # notices

    def run(self) -> list[Result]:
        while self._step():
            pass
        return self._results

    def close(self) -> None:
        """Let go of what is unfinished; a run that was refused before it began leaves nothing."""
        for clip in list(self._clips):
            folder = clip.job.workspace.folder
            if self._pool.failure and not any((folder / "units").iterdir()):
                clip.job.workspace.remove()
            self._close(clip)

    def _step(self) -> bool:
        """Do the most urgent thing; returns whether anything is left to be done."""
        self._hear()
        joined = next((clip for clip in self._clips if clip.joining and clip.has(clip.wanted)), None)
        complete = [clip for clip in self._clips if not (clip.left or clip.joining or clip.has_failed)]
        can_read = self._next < len(self._results) and self._pool.waiting < self._ahead
        if joined:
            self._join_next_unit(joined)
        elif can_read and (not complete or (self._pool.waiting < self._workers and len(complete) <= self._workers)):
            self._read_next_clip()
        elif clip := self._clip_to_join(complete):
            clip.joining = clip.job.joining(self._tell)
            clip.stack.callback(clip.joining.close)
            self._join_next_unit(clip)
        elif not self._clips:
            return False
        else:
            self._hear(WAIT)
            self._tell()
        return True

    def _hear(self, timeout: float = 0.0) -> None:
        """Take note of what the pool has to say; waits for it for `timeout` seconds."""
        while True:
            try:
                assignment = self._pool.events.get(timeout > 0, timeout)
            except Empty:
                return
            timeout = 0.0
            if assignment is None:
                assert self._pool.failure is not None
                raise self._pool.failure
            clip = next((clip for clip in self._clips if clip.job is assignment.job), None)
            if clip is None:  # its output could not be written
                continue
            scene = assignment.scene if assignment.is_given_up else None
            clip.left -= {assignment.unit} if scene is None else set(scene.units)
            if assignment.record is not None:
                for notice in set(assignment.record.notices) - self._told:
                    self._told.add(notice)
                    log.warning("%s", notice)
            else:
                self._fail(clip.number, f"{assignment.unit}: {assignment.failures[-1]}")
            if not clip.left and clip.has_failed:
                self._close(clip)

    def _read_next_clip(self) -> None:
        number, self._next = self._next, self._next + 1
        result, stack = self._results[number], ExitStack()
        try:
            job = stack.enter_context(
                open_job(
                    result.input,
                    result.output,
                    self._setting,
                    side_by_side=self._side_by_side,
                    progress=self._tell,
                )
            )
            assignments = _assignments(job)
        except UserError as error:
            stack.close()
            if len(self._results) == 1:
                raise
            self._fail(number, str(error))
            return
        result.frames = job.frames
        left = {unit for unit, each in assignments.items() if each.record is None}
        self._clips.append(_Clip(number, job, stack, assignments, left))
        finished = len(assignments) - len(left)
        before = f", {finished} of them finished before" if finished else ""
        log.info("%s: %d frames in %d scenes%s", job.input, job.frames, len(assignments), before)
        for assignment in assignments.values():
            if assignment.record is None:
                self._pool.add(assignment)
            else:
                assignment.done = assignment.work

    def _clip_to_join(self, complete: list[_Clip]) -> _Clip | None:
        """A complete one if there is any, else one that is joined while the rest of it is being sampled."""
        if complete or any(clip.joining for clip in self._clips):
            return complete[0] if complete else None
        return next((clip for clip in self._clips if clip.has(clip.job.units[0]) and not clip.has_failed), None)

    def _join_next_unit(self, clip: _Clip) -> None:
        """Write the pictures of the unit whose turn it is; after the last one the output is in place."""
        assert clip.joining is not None
        result = self._results[clip.number]
        try:
            clip.wanted = next(clip.joining, None)
        except UserError as error:
            clip.wanted = None
            self._pool.drop(clip.job)
            self._fail(clip.number, str(error))
        if clip.wanted is None:
            if not result.error:
                log.info("wrote %s: %d frames", result.output, result.frames)
            self._close(clip)

    def _close(self, clip: _Clip) -> None:
        result = self._results[clip.number]
        for unit, assignment in clip.assignments.items():
            if assignment.record is not None:
                result.units.append({"first": unit.first, "last": unit.last, **asdict(assignment.record)})
            self._done += assignment.done
        result.seconds = round(time.monotonic() - clip.start, 3)
        self._clips.remove(clip)
        clip.stack.close()

    def _fail(self, number: int, reason: str) -> None:
        result = self._results[number]
        result.error = f"{result.error}; {reason}" if result.error else reason
        log.error("%s: %s", result.input, reason)

    def _tell(self, event: Progress | None = None) -> None:
        """Report how far the sampling is; where that is done, what else is going on."""
        if self._watch is not None:
            self._watch(self._pool.at_work())
        all_units = [each for clip in self._clips for each in clip.assignments.values()]
        total = self._done + sum(each.work for each in all_units)
        done = self._done + sum(each.done for each in all_units)
        if done < total or event is None:
            event = Progress("denoise", done, total)
        if event.done:
            report(self._progress, event)


def _assignments(job: Job) -> dict[Unit, Assignment]:
    """What is to be done for a clip; what has been done has a record."""
    found: dict[Unit, Assignment] = {}
    for units in scenes_of(job.units):
        scene = Scene(job, units) if len(units) > 1 else None
        found |= {unit: Assignment(job, unit, scene, record=job.record(unit)) for unit in units}
    return found
