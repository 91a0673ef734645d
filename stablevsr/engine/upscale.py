"""A clip from file to file through the whole model, by way of a workspace: it can be killed and continued."""

import logging
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from stablevsr.atomic import restore
from stablevsr.config import SCALE
from stablevsr.engine.fingerprint import fingerprint
from stablevsr.engine.ingest import Footage, ingest
from stablevsr.engine.plan import Clock, Output, Plan
from stablevsr.engine.progress import OnProgress, Progress, report
from stablevsr.engine.run import Run
from stablevsr.engine.store import DiskStore
from stablevsr.engine.workspace import Workspace, open_workspace
from stablevsr.errors import IncompleteOutput, UserError
from stablevsr.media import Encoding, Frame, Reader, Writer, check_output, open_reader, open_writer
from stablevsr.model import StableVSR
from stablevsr.sampling.config import SamplingConfig, resolve
from stablevsr.sampling.denoiser import prompt_context
from stablevsr.sampling.pictures import PictureFormat, bicubic, normalise

log = logging.getLogger(__name__)
T = TypeVar("T")


def upscale(
    model: StableVSR,
    input: str | Path | Reader,
    output: str | Path,
    config: SamplingConfig | None = None,
    *,
    side_by_side: Path | None = None,
    encoding: Encoding | None = None,
    force: bool = False,
    restart: bool = False,
    keep_workspace: bool = False,
    progress: OnProgress | None = None,
    **fields: object,
) -> int:
    """Upscale a clip four times into `output`, which appears under its name only when it is whole.

    What is done so far lies in a folder beside the output; the same call continues there after a crash and ends with
    the same bits. Memory does not grow with the number of frames. All options are checked before a frame is read.

    Args:
        model: from `build_model`.
        input: a video, an image or a folder of images, or an open reader.
        output: a video, an image (for one frame), or a folder; the name decides.
        config: how to sample; None takes what the weights were made for.
        side_by_side: a second output, with bicubic interpolation on the left and the result on the right.
        encoding: codec and quality of a video.
        force: replace an output that exists.
        restart: throw away an unfinished run instead of continuing it.
        keep_workspace: leave the workspace there at the end.
        progress: called with a `Progress` after each unit of work; return False to stop.
        fields: fields of `SamplingConfig` by name, which override `config`'s.

    Returns:
        The number of frames written.

    Raises:
        UserError: for options that make no sense, input that cannot be read, output that cannot be written, an
            unfinished run of other settings, and a disk that is too small.
        IncompleteOutput: when the picture is in place, but sound or another stream could not be added to it.
        Stopped: when `progress` returned False.
    """
    output = Path(output)
    config = resolve(config, model.sampling, fields)
    with ExitStack() as stack:
        clip = input if isinstance(input, Reader) else stack.enter_context(open_reader(input))
        config.check(model.config, clip.frame_count)
        context = prompt_context(model, config)
        for path in filter(None, (output, side_by_side)):
            restore(path)
            check_output(path, clip.path, force)
        workspace = stack.enter_context(open_workspace(output))
        stack.enter_context(_removed_if_refused(workspace))
        with ExitStack() as open_writers:
            # Opened first: what they refuse, they refuse before hours of work.
            writers = Writers.open(open_writers, workspace, clip, output, side_by_side, encoding, force)
            for notice in writers.result.notices:
                log.warning("%s", notice)
            workspace.begin(fingerprint(model, clip, config), restart)
            store = open_writers.enter_context(DiskStore(workspace, model.device))
            footage = _follow(ingest(store, workspace, clip, config), progress)
            config.check(model.config, len(footage.frames))
            run = Run(
                model,
                store,
                config,
                footage.frames,
                cuts=footage.cuts,
                context=context,
                format=PictureFormat(torch.uint16 if writers.is_deep else torch.uint8),
            )
            _sample(run, store, workspace, footage, writers.bounds, progress)
            phase = "write" if store.keeps("pictures") else "decode"
            for index, picture in enumerate(run.pictures()):
                writers.write(picture, footage.frame(index))
                report(progress, Progress(phase, index + 1, len(footage.frames)))
        if not keep_workspace:
            workspace.remove()
    if writers.failures:
        raise IncompleteOutput(f"{output} is written, but not all of it: {' '.join(writers.failures)}")
    return len(footage.frames)


@contextmanager
def _removed_if_refused(workspace: Workspace) -> Iterator[None]:
    """Nothing is worth keeping of a run that was refused, or that has not even read its input."""
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, UserError) and not workspace.has_state()
        if workspace.is_ours and (refused or workspace.noted("clip") is None):
            workspace.remove()
        raise


def _sample(
    run: Run,
    store: DiskStore,
    workspace: Workspace,
    footage: Footage,
    outputs: list[Output],
    progress: OnProgress | None,
) -> None:
    """Everything up to the decoded pictures, from where an earlier run stopped; says what it will take."""
    n, state, total = len(footage.frames), run.state, run.num_frame_steps
    new = state.phase == "flow" and state.done == 0
    plan = Plan.make(workspace, run.sizes(), new, n, outputs)
    store.kept = plan.kept
    if not new:
        units = {"flow": n - 1, "denoise": total, "decode": n}[state.phase]
        log.info("continuing: %d of %d in phase %s are done", state.done, units, state.phase)
    elif footage.cuts:
        log.info("scene cuts at frames %s", ", ".join(map(str, footage.cuts)))
    log.info("%s", plan.sentence(n, total))
    clock = Clock(total - (state.done if state.phase == "denoise" else 0))
    for event in run.events():
        report(progress, event)
        if event.phase == "denoise" and (sentence := clock.after_a_step()):
            log.info("%s", sentence)


def _follow(work: Generator[Progress, None, T], progress: OnProgress | None) -> T:
    """Do work that tells its progress; returns its result."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        report(progress, event)


@dataclass(frozen=True)
class Writers:
    """The outputs of a run, open."""

    result: Writer
    pair: Writer | None  # bicubic interpolation beside the result
    bounds: list[Output]  # what they can need of the disk

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        workspace: Workspace,
        clip: Reader,
        output: Path,
        side_by_side: Path | None,
        encoding: Encoding | None,
        force: bool,
    ) -> "Writers":
        """Open them on `stack`; the last one opened, the result, is the first that is put in place."""

        def open_one(path: Path, part: Path, width: int) -> Writer:
            size = {"height": SCALE * clip.height, "width": width}
            writer = stack.enter_context(open_writer(path, clip, force=force, part=part, encoding=encoding, **size))
            bounds.append(Output.of(writer, clip, encoding, size["height"] * width, part.parent))
            return writer

        bounds, pair = [], None
        if side_by_side:  # not in the workspace: its name may be on another disk
            pair = open_one(side_by_side, workspace.outside(side_by_side), 2 * SCALE * clip.width)
        return cls(open_one(output, workspace.folder / "output", SCALE * clip.width), pair, bounds)

    @property
    def failures(self) -> list[str]:
        """What could not be added to a picture that is in place, once they are closed."""
        return self.result.failures + (self.pair.failures if self.pair else [])

    @property
    def is_deep(self) -> bool:
        """Whether one of them takes 16 bits a channel."""
        return self.result.is_deep or (self.pair is not None and self.pair.is_deep)

    def write(self, picture: Tensor, frame: Frame) -> None:
        """Append a finished picture, (4h, 4w, 3) uint8 or uint16, for `frame`, whose alpha is enlarged with it."""
        image = in_depth(picture.numpy(), self.result.is_deep)
        if frame.alpha is not None and self.result.takes_alpha:
            alpha = enlarged(frame.alpha[..., None], self.result.is_deep)
            image = np.concatenate([image, alpha], axis=-1)
        self.result.write(image, frame)
        if self.pair:
            both = [enlarged(frame.image, self.pair.is_deep), in_depth(picture.numpy(), self.pair.is_deep)]
            self.pair.write(np.concatenate(both, axis=1), frame)


def in_depth(image: np.ndarray, is_deep: bool) -> np.ndarray:
    """(h, w, c) uint8 or uint16 in the depth that a writer takes."""
    if (image.dtype == np.uint16) == is_deep:
        return image
    return image.astype(np.uint16) * 257 if is_deep else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def enlarged(image: np.ndarray, is_deep: bool) -> np.ndarray:
    """(h, w, c) uint8 or uint16 to (4h, 4w, c) by bicubic interpolation, in the depth that a writer takes."""
    picture = (bicubic(normalise(torch.from_numpy(image)[None])) / 2 + 0.5).clamp(0, 1)
    return PictureFormat(torch.uint16 if is_deep else torch.uint8).encode(picture).numpy()
