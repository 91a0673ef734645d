"""A bidirectional pass of the model over a clip on disk; a result of more than four times the size takes two."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.ingest import CPU, Footage
from stablevsr.engine.plan import OPTIONAL, Clock, Output, Plan, size
from stablevsr.engine.progress import OnProgress, report
from stablevsr.engine.run import Run
from stablevsr.engine.store import DiskStore
from stablevsr.engine.workspace import Workspace
from stablevsr.model import Model
from stablevsr.sampling.config import SamplingConfig
from stablevsr.sampling.pictures import PictureFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """One pass of the model: the only one, or one of two.

    footage: the input, whose scenes are those of both passes.
    workspace, store: hold the arrays of this pass.
    bounds: upper bounds on the disk space of the outputs.
    number: of the pass, from 1, out of `passes`.
    """

    model: Model
    config: SamplingConfig
    context: Tensor
    footage: Footage
    workspace: Workspace
    store: DiskStore
    bounds: list[Output]
    number: int
    passes: int
    progress: OnProgress | None

    def run(self, frames: LowResFrames, is_deep: bool) -> Run:
        """Do what is left to do, up to the decoded pictures, of 16 bits a channel if `is_deep`, else 8."""
        run = Run(
            self.model,
            self.store,
            self.config,
            frames,
            cuts=self.footage.cuts,
            context=self.context,
            format=PictureFormat(torch.uint16 if is_deep else torch.uint8),
            notify=self.number == 1,
        )
        self._plan(run, len(frames))
        left = run.num_frame_steps - (run.state.done if run.state.phase == "denoise" else 0)
        clock = Clock(left, 0 if self._is_last else SCALE**2 * run.num_frame_steps)
        for event in run.events():
            report(self.progress, event)
            if event.phase == "denoise" and (sentence := clock.after_a_step()):
                log.info("%s%s", self._name, sentence)
        return run

    def for_the_next(self, frames: LowResFrames, is_deep: bool) -> LowResFrames:
        """As `run`; returns the pictures as the frames of the next pass."""
        state = self.store.load()
        if (state.phase, state.done) != ("decode", len(frames)):
            self.run(frames, is_deep)
            self.store.drop("latents")
        height, width = (SCALE * side for side in frames.size)
        dtype = torch.uint16 if is_deep else torch.uint8
        return LowResFrames(self.store.array("pictures", (height, width, 3), dtype, CPU), len(frames), (height, width))

    @property
    def _is_last(self) -> bool:
        return self.number == self.passes

    @property
    def _name(self) -> str:
        """To begin a message with."""
        return f"pass {self.number} of {self.passes}: " if self.passes > 1 else ""

    def _plan(self, run: Run, num_frames: int) -> None:
        """Decide which arrays to keep, and log what the run needs."""
        state, total, sizes = run.state, run.num_frame_steps, run.sizes()
        new = state.phase == "flow" and state.done == 0
        # The next pass reads the pictures, and has frames of so many times the pixels.
        optional = OPTIONAL if self._is_last else OPTIONAL - {"pictures"}
        later = 0 if self._is_last else SCALE**2 * sum(sizes[name] for name in sizes.keys() - OPTIONAL)
        plan = Plan.make(self.workspace, sizes, new, num_frames, self.bounds, optional, later)
        self.store.kept = plan.kept
        if not new:
            units = {"flow": num_frames - 1, "denoise": total, "decode": num_frames}[state.phase]
            log.info("%scontinuing: %d of %d in phase %s are done", self._name, state.done, units, state.phase)
        elif self.footage.cuts and self.number == 1:
            log.info("scene cuts at frames %s", ", ".join(map(str, self.footage.cuts)))
        more = f"; the second pass needs {size(later)}" if later else ""
        log.info("%s%s%s", self._name, plan.sentence(num_frames, total), more)
