"""`--shard I/N`: N processes, started by anything, share out the scenes of the same clips through a shared folder.

Each samples its own share of every clip. Pieces and states are in the workspace beside the output, so a process that
was killed continues when it is started again. Whoever finds all pieces of a clip there joins them.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from stablevsr.cluster.description import ModelDescription, gpu_name, machine_name
from stablevsr.cluster.job import Job, Result, Setting, is_finished, open_job
from stablevsr.cluster.pieces import Record, write_record
from stablevsr.cluster.run_unit import FrameFile, collecting_notices, run_unit
from stablevsr.cluster.units import Shard, Unit
from stablevsr.engine.progress import OnProgress
from stablevsr.engine.workspace import turn
from stablevsr.errors import OptionsError, UserError
from stablevsr.model import Model

log = logging.getLogger(__name__)


def run_shard(
    clips: Sequence[tuple[Path, Path]],
    description: ModelDescription,
    setting: Setting,
    shard: Shard,
    *,
    side_by_side: Path | None = None,
    progress: OnProgress | None = None,
) -> list[Result]:
    """Do one process's share of the work. Clips that cannot be read, and scenes that fail, do not stop the others.

    An output that exists counts as finished.

    Args:
        clips: inputs and outputs, the same in all processes, in the same order.
        side_by_side: a second output of the only clip.

    Raises:
        UserError: for options, weights and devices that do not work, and for a single clip that cannot be read.
        Stopped: when `progress` returned False.
    """
    if setting.restart or setting.force:
        option = "restart" if setting.restart else "force"
        raise OptionsError(
            f"got {option} with a shard, where each process would discard the others' work: delete the unfinished "
            "folder or the output first"
        )
    setting = replace(setting, machine=description.facts())
    with ExitStack() as stack:
        run = _Run(shard, setting, description, progress, len(clips) == 1)
        for number, (clip, output) in enumerate(clips):
            run.open(stack, number, clip, output, side_by_side)
        run.work()
        return [run.results[number] for number in range(len(clips))]


@dataclass
class _Run:
    """A process that works on its share."""

    shard: Shard
    setting: Setting
    description: ModelDescription
    progress: OnProgress | None
    is_only: bool  # whether there is one clip only, whose errors are the run's
    jobs: dict[int, Job] = field(default_factory=dict)  # by number of the clip: those that are not finished
    results: dict[int, Result] = field(default_factory=dict)
    model: Model | None = None
    told: list[str] = field(default_factory=list)  # notices of units, which repeat each other's

    def open(self, stack: ExitStack, number: int, clip: Path, output: Path, side_by_side: Path | None) -> None:
        self.results[number] = Result(clip, output)
        if is_finished(output):
            log.warning("%s exists already, so %s counts as finished: delete it to have it made again", output, clip)
            return
        try:
            job = open_job(clip, output, self.setting, shared=True, side_by_side=side_by_side, progress=self.progress)
            self.jobs[number] = stack.enter_context(job)
        except UserError as error:
            if self.is_only:
                raise
            self.fail(number, error)

    def work(self) -> None:
        mine = [(number, unit) for number, job in self.jobs.items() for unit in self.shard.of(job.units, number)]
        for number, unit in sorted(mine, key=lambda each: -each[1].count):
            job = self.jobs.get(number)
            try:
                if job is not None and job.record(unit) is None:
                    self.sample(job, unit)
            except UserError as error:
                if self.model is None:  # it could not be built, which concerns all units
                    raise
                self.fail(number, f"{unit}: {error}")
            self.join_if_complete(number)
        for number, job in list(self.jobs.items()):
            self.join_if_complete(number)
            if number in self.jobs:
                left = len(job.missing())
                log.info("%s: %d of %d scenes are left to other processes", job.input, left, len(job.units))

    def sample(self, job: Job, unit: Unit) -> None:
        if self.model is None:
            self.model = self.description.build()
        log.info("%s, %s of %d", job.input, unit, job.frames)
        order, start, notices = job.order(unit), time.monotonic(), list(self.told)
        frames = FrameFile(job.frames_path, order, unit.first)
        try:
            with collecting_notices(notices):
                made = run_unit(self.model, order, frames, job.piece(unit), self.progress)
        finally:
            frames.close()
            for notice in notices[len(self.told) :]:
                log.warning("%s", notice)
            self.told = notices
        seconds = round(time.monotonic() - start, 3)
        record = Record(unit.count, made.digest, machine_name(), gpu_name(self.model), seconds, made.sampling)
        write_record(job.piece(unit), record)

    def join_if_complete(self, number: int) -> None:
        """Join the pieces of a clip if all are there. Of several processes that see that, the first one does."""
        job, result = self.jobs.get(number), self.results[number]
        if job is None:
            return
        try:
            if job.workspace.folder.exists() and job.missing():
                return
            del self.jobs[number]  # whatever comes of it
            with turn(job.workspace) as is_there:
                if not is_there or is_finished(job.output):
                    return
                done = job.result()
                result.frames, result.units = done.frames, done.units
                for _ in job.joining(self.progress):
                    pass
            log.info("wrote %s: %d frames", job.output, job.frames)
        except UserError as error:
            self.fail(number, error)

    def fail(self, number: int, error: object) -> None:
        result = self.results[number]
        result.error = f"{result.error}; {error}" if result.error else str(error)
        log.error("%s: %s", result.input, error)
