"""Upscaling a clip from file to file: `upscale`. A run works in a workspace, so it can be killed and continued."""

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from stablevsr.atomic import restore
from stablevsr.engine.fingerprint import fingerprint
from stablevsr.engine.ingest import ingest
from stablevsr.engine.outputs import Writers, needs_even_sides
from stablevsr.engine.passes import Pass
from stablevsr.engine.pipe import upscale_pipe
from stablevsr.engine.progress import OnProgress, Progress, in_pass, report
from stablevsr.engine.store import DiskStore
from stablevsr.engine.stream import Stream
from stablevsr.engine.stream_file import StreamedFile
from stablevsr.engine.workspace import Workspace, open_workspace
from stablevsr.errors import IncompleteOutput, OptionsError, UserError
from stablevsr.media import Encoding, Reader, Writer, check_output, open_reader, open_writer
from stablevsr.media.paths import output_kind
from stablevsr.media.pipe import PIPE, PipeWriter
from stablevsr.model import Model
from stablevsr.sampling.config import SamplingConfig, resolve
from stablevsr.sampling.denoiser import prompt_context
from stablevsr.sampling.resizing import MAX_PASSES, output_size, passes_for, pixel_aspect

log = logging.getLogger(__name__)
T = TypeVar("T")


def upscale(
    model: Model,
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
    """Upscale a clip four times, or to the size that the config asks for; above four times by two passes of the model.

    The output appears under its name only when it is complete. The work so far is kept in a folder beside it; after a
    crash the same call continues it and ends with the same bits. Memory does not grow with the number of frames. All
    options are checked before a frame is read.

    Args:
        model: from `build_model`.
        input: a video, an image or a folder of images, or an open reader; "-" is yuv4mpegpipe or NUT from standard
            input.
        output: a video, an image (for one frame), or a folder; the name decides. "-" is yuv4mpegpipe to standard
            output. Pipes need mode "streaming", and runs through them cannot be continued.
        config: how to sample; None takes what the weights were made for.
        side_by_side: a second output, with bicubic interpolation on the left and the result on the right.
        encoding: codec and quality of a video.
        force: replace an output that exists.
        restart: discard an unfinished run instead of continuing it.
        keep_workspace: do not delete the workspace at the end.
        progress: called with a `Progress` after each unit of work; return False to stop.
        fields: fields of `SamplingConfig` by name, which override `config`'s.

    Returns:
        The number of frames written.

    Raises:
        UserError: for invalid options, input that cannot be read, output that cannot be written, an unfinished run
            with other settings, and a disk that is too small.
        IncompleteOutput: when the output is written, but sound or another stream could not be added to it.
        Stopped: when `progress` returned False.
    """
    output = Path(output)
    config = resolve(config, model.sampling, fields)
    with ExitStack() as stack:
        clip = input if isinstance(input, Reader) else stack.enter_context(open_reader(input))
        config.check(model.config, clip.frame_count)
        context = prompt_context(model, config)
        if PIPE in (clip.path, output):
            if side_by_side or (output != PIPE and output_kind(output) == "image"):
                raise OptionsError(f"got {side_by_side or output} with a pipe, which carries one video only: omit it")
            return _through_pipe(model, clip, output, config, context, encoding, force, progress)
        even = needs_even_sides(output, side_by_side)
        size = output_size(config, clip.height, clip.width, even, MAX_PASSES)
        for path in filter(None, (output, side_by_side)):
            restore(path)
            check_output(path, clip.path, force)
        workspace = stack.enter_context(open_workspace(output))
        stack.enter_context(_removed_if_refused(workspace))
        with ExitStack() as open_writers:
            # Opened first, so that what they refuse is refused before hours of work.
            writers = Writers.open(open_writers, workspace, clip, output, side_by_side, encoding, force, size)
            for notice in writers.result.notices:
                log.warning("%s", notice)
            passes = passes_for(size, (clip.height, clip.width))
            job = fingerprint(model, clip, config) | {"number of passes": passes}
            if config.mode == "streaming":  # where outputs are written from the first frame on
                job |= {"encoding": encoding or Encoding(), "side by side": side_by_side}
            workspace.begin(job, restart)
            store = open_writers.enter_context(DiskStore(workspace, model.device))
            count = _Job(model, clip, config, context, passes, workspace, store, writers, progress).run()
        if not keep_workspace:
            workspace.remove()
    _require_complete(output, writers.failures)
    return count


def _through_pipe(
    model: Model,
    clip: Reader,
    output: Path,
    config: SamplingConfig,
    context: Tensor,
    encoding: Encoding | None,
    force: bool,
    progress: OnProgress | None,
) -> int:
    """Upscale from a pipe, into one, or both."""
    if config.mode != "streaming":
        raise OptionsError(
            f"got mode {config.mode} for a pipe, but it needs all frames before the first is done: use mode streaming, "
            "or files"
        )
    size, failure, count = output_size(config, clip.height, clip.width, even=True), None, 0
    form: dict[str, Any] = {"height": size[0], "width": size[1]}
    form["aspect"] = pixel_aspect(clip.sample_aspect_ratio, (clip.height, clip.width), size)
    opened: AbstractContextManager[PipeWriter | Writer]
    if output == PIPE:
        opened = PipeWriter(clip, **form)
    else:
        restore(output)
        check_output(output, clip.path, force)
        opened = open_writer(output, clip, force=force, encoding=encoding, **form)
    with opened as writer:
        for notice in writer.notices:
            log.warning("%s", notice)
        stream = Stream(model, config, (clip.height, clip.width), context=context)
        try:
            count = upscale_pipe(stream, clip, Writers(writer, size), progress)
        except IncompleteOutput as error:  # raised once the output is finished
            failure = error
    if failure:
        raise failure
    _require_complete(output, writer.failures)
    return count


def _require_complete(output: Path, failures: list[str]) -> None:
    if failures:
        raise IncompleteOutput(f"{output} is written, but not all of it: {'; '.join(failures)}")


@contextmanager
def _removed_if_refused(workspace: Workspace) -> Iterator[None]:
    """Remove the workspace of a run that was refused, or that has not read all of its input."""
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, UserError) or workspace.noted("clip") is None
        if workspace.is_ours and refused and not workspace.has_state():
            workspace.remove()
        raise


@dataclass(frozen=True)
class _Job:
    """A run with all its files open."""

    model: Model
    clip: Reader
    config: SamplingConfig
    context: Tensor
    passes: int
    workspace: Workspace
    store: DiskStore
    writers: Writers
    progress: OnProgress | None

    def run(self) -> int:
        """Do the remaining work; returns the number of frames."""
        return self._stream() if self.config.mode == "streaming" else self._sample()

    def _stream(self) -> int:
        stream = Stream(self.model, self.config, (self.clip.height, self.clip.width), context=self.context)
        return StreamedFile(stream, self.clip, self.writers, self.store, self.workspace).run(self.progress)

    def _sample(self) -> int:
        footage = run_to_end(ingest(self.store, self.workspace, self.clip, self.config), self.progress)
        self.config.check(self.model.config, len(footage.frames))
        with ExitStack() as stack:
            last = Pass(
                self.model,
                self.config,
                self.context,
                footage,
                self.workspace,
                self.store,
                self.writers.bounds,
                self.passes,
                self.passes,
                in_pass(self.progress, self.passes, self.passes),
            )
            frames = footage.frames
            if self.passes > 1:
                workspace = stack.enter_context(closing(self.workspace.first_pass()))
                store = stack.enter_context(DiskStore(workspace, self.model.device))
                progress = in_pass(self.progress, 1, self.passes)
                first = replace(last, workspace=workspace, store=store, number=1, progress=progress)
                frames = first.for_the_next(frames, self.clip.is_deep)
            run = last.run(frames, self.writers.is_deep)
            phase = "write" if self.store.keeps("pictures") else "decode"
            for index, picture in enumerate(run.pictures()):
                self.writers.write(picture, footage.frame(index))
                report(last.progress, Progress(phase, index + 1, len(footage.frames)))
        return len(footage.frames)


def run_to_end(work: Generator[Progress, None, T], progress: OnProgress | None) -> T:
    """Run a generator to its end, reporting what it yields; returns its result."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        report(progress, event)
