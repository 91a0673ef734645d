"""The command `upscale`: checks inputs and outputs before it loads the weights, which it does once for all inputs."""

import argparse
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stablevsr.atomic import restore
from stablevsr.cli.console import DONE, FAILED, ProgressBars
from stablevsr.cli.preview import check_place, check_preview, show
from stablevsr.cli.upscale_options import flag, sampling_fields, sampling_values
from stablevsr.cli.weights import asking
from stablevsr.engine.outputs import needs_even_sides
from stablevsr.engine.upscale import upscale
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import OptionsError
from stablevsr.hub.fetch import Offer
from stablevsr.media import Encoding, PartReader, Reader, check_output, open_reader, output_for
from stablevsr.media.pipe import PIPE
from stablevsr.model import Model, build_model, find_weights
from stablevsr.sampling.config import PRESETS, SamplingConfig
from stablevsr.sampling.resizing import MAX_PASSES, output_size, passes_for
from stablevsr.weights import read_header

if TYPE_CHECKING:
    from stablevsr.cluster.job import Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One clip to upscale, and its result."""

    input: Path
    output: Path
    frames: int = 0
    seconds: float = 0.0
    error: str = ""


def run(options: argparse.Namespace) -> int:
    if any(each is not None for each in (options.cluster, options.shard, options.workers, options.cpus_per_worker)):
        from stablevsr.cli.cluster import run_on_several

        return run_on_several(options)
    tasks, done, model = find_tasks(options), [], None
    if options.preview:
        check_preview([task.output for task in tasks], [task.input for task in tasks])
    if options.weights:
        options.weights = fetch_weights(tasks, options)
    config = sampling_config(options)
    for task in tasks:
        fatal = len(tasks) == 1 or options.debug
        try:
            for path in filter(None, (task.output, options.side_by_side)) if not options.preview else ():
                if path != PIPE:
                    restore(path)
                    check_output(path, task.input, options.force)
            with open_clip(task.input, options) as clip:
                if options.preview:
                    check_place(clip, options)
                if model is None:
                    fatal = True  # errors of the weights or the device concern all inputs
                    model = load(options)
                    fatal = len(tasks) == 1 or options.debug
                if options.preview:
                    return show(model, clip, task.output, config, options)
                done.append(upscale_one(model, clip, task, config, options))
        except BrokenPipeError:
            raise
        except Exception as error:
            done.append(replace(task, error=str(error) or type(error).__name__))
            if fatal:
                print_summary(done, options)
                raise
            log.error("%s", done[-1].error)
    print_summary(done, options)
    return FAILED if any(task.error for task in done) else DONE


def find_tasks(options: argparse.Namespace) -> list[Task]:
    """The clips and outputs that the command line names."""
    paths, output = options.paths, options.output
    if output is None:
        if len(paths) != 2:
            raise OptionsError(f"got {len(paths)} paths, expected IN OUT, or inputs and -o OUT")
        tasks = [Task(*paths)]
    elif len(paths) == 1 and not output.is_dir():
        tasks = [Task(paths[0], output)]
    else:
        if not output.is_dir():
            raise OptionsError(f"got several inputs, but {output} is not a folder: create it first")
        tasks = [Task(path, output_for(path, output)) for path in paths]
        names = [task.output.name for task in tasks]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise OptionsError(
                f"two inputs would both be written to {output / twice[0]}: rename one, or upscale it on its own"
            )
    if PIPE in [path for task in tasks for path in vars(task).values()]:
        if len(tasks) > 1:
            raise OptionsError("got - among several inputs, but a pipe carries one video only: upscale it on its own")
        if options.json and tasks[0].output == PIPE:
            raise OptionsError("standard output cannot take both the video and what --json prints: omit one")
    pair = options.side_by_side
    if pair and len(tasks) > 1:
        raise OptionsError("got --side-by-side with several inputs, expected one: omit it, or upscale one at a time")
    if pair and pair.resolve() == tasks[0].output.resolve():
        raise OptionsError(f"{pair} is named twice: choose another file for --side-by-side")
    return tasks


def fetch_weights(tasks: list[Task], options: argparse.Namespace) -> Path:
    """The weights file that --weights names; a single clip is looked at before weights for it are downloaded."""

    def confirm(offer: Offer) -> bool:
        for task in tasks if len(tasks) == 1 and PIPE not in (tasks[0].input, tasks[0].output) else ():
            if not options.preview:
                check_output(task.output, task.input, options.force)
            with open_reader(task.input, options.allow_truncated, options.allow_hdr):
                pass
        return asking(options.yes)(offer)

    return find_weights(options.weights, confirm)


def sampling_config(options: argparse.Namespace) -> SamplingConfig:
    """The preset or the weights' own config, overridden by the options; checked against the weights file's header."""
    header = read_header(find_weights(options.weights))
    try:
        config = (PRESETS[options.preset] if options.preset else header.sampling).with_fields(sampling_values(options))
        config.check(header.config)
    except OptionsError as error:
        raise OptionsError(with_flags(str(error))) from error
    return config


def with_flags(message: str) -> str:
    """A message with sampling options named as they are typed: --cfg-scale for cfg_scale; single words stay."""
    names = [name for name, _, _ in sampling_fields() if "_" in name or "." in name]
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda match: flag(match[0]), message)


@contextmanager
def open_clip(path: Path, options: argparse.Namespace) -> Iterator[Reader]:
    """Open the input, optionally a frame range, and log its notices."""
    with open_reader(path, options.allow_truncated, options.allow_hdr) as clip:
        part = clip if options.frames == (0, None) else PartReader(clip, *options.frames)
        for notice in part.notices:
            log.warning("%s", notice)
        yield part


def load(options: argparse.Namespace) -> Model:
    """Load the model according to the options; logs the notes in its weights file."""
    model = build_model(options.weights, options.device, options.dtype, options.compile, options.offload)
    for notice in untrained_parts(model.provenance):
        log.warning("%s", notice)
    return model


def untrained_parts(provenance: dict[str, str]) -> list[str]:
    """Notes about a weights file that the user should see first: its own note, or else its untrained parts."""
    if "note" in provenance:
        return [provenance["note"]]
    return [f"{part} is {origin}" for part, origin in provenance.items() if origin.startswith("untrained")]


def upscale_one(model: Model, clip: Reader, task: Task, config: SamplingConfig, options: argparse.Namespace) -> Task:
    """Run one task; returns it with the number of frames and the seconds it took."""
    even = needs_even_sides(task.output, options.side_by_side)
    height, width = output_size(config, clip.height, clip.width, even, MAX_PASSES)
    twice = passes_for((height, width), (clip.height, clip.width)) > 1
    log.info(
        "%s (%dx%d) to %s (%dx%d), %s%d steps on %s, %s",
        task.input,
        clip.width,
        clip.height,
        task.output,
        width,
        height,
        "two passes of " if twice else "",
        config.steps_taken,
        model.device,
        options.dtype or "fp32",
    )
    start = time.monotonic()
    with ProgressBars() as bars, pointing_to(workspace_path(task.output)):
        count = upscale(
            model,
            clip,
            task.output,
            config,
            side_by_side=options.side_by_side,
            encoding=Encoding(options.codec, options.crf),
            force=options.force,
            restart=options.restart,
            keep_workspace=options.keep_workspace,
            progress=bars,
        )
    seconds = time.monotonic() - start
    log.info("wrote %s: %d frames in %.0f s", task.output, count, seconds)
    return replace(task, frames=count, seconds=round(seconds, 3))


@contextmanager
def pointing_to(workspace: Path) -> Iterator[None]:
    """If a run is interrupted, say how to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        if workspace.exists():
            log.error("run the same command again to continue, or delete %s", workspace)
        raise


def print_summary(done: "Sequence[Task | Result]", options: argparse.Namespace) -> None:
    """Log the result of each task if there are several; print all as JSON with --json."""
    if len(done) > 1:
        for task in done:
            result = f"FAILED: {task.error}" if task.error else f"{task.frames} frames, {task.output}"
            log.info("%s: %s", task.input, result)
    if options.json:
        print(json.dumps([asdict(task) for task in done], default=str, indent=1))
