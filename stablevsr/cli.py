"""The `stablevsr` command: options in, sentences out. The work is done elsewhere."""

import argparse
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from stablevsr import __version__
from stablevsr.arguments import build_parser
from stablevsr.atomic import replacing, restore
from stablevsr.errors import UserError
from stablevsr.evaluation.clips import labels
from stablevsr.evaluation.collect import Settings
from stablevsr.evaluation.compare import check_page, compare_page
from stablevsr.evaluation.evaluate import Evaluator, clip_pairs, evaluate
from stablevsr.evaluation.report import as_csv, as_json, table
from stablevsr.jobs.fingerprint import hash_weights
from stablevsr.jobs.upscale import upscale
from stablevsr.jobs.workspace import workspace_path
from stablevsr.media import Encoding, PartReader, Reader, check_output, open_reader, output_for
from stablevsr.model import StableVSR, build_model
from stablevsr.runtime import pick_device
from stablevsr.sampling.presets import PRESETS
from stablevsr.sampling.video import Progress
from stablevsr.training.train import train

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
UNITS = {"read": "frame", "flow": "pair", "denoise": "frame-step", "decode": "frame"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 a run failed, 2 bad usage or input, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(), stopped_by_signal():
            warnings.showwarning = lambda message, *_: tell(f"note: {message}")
            return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        tell("interrupted; nothing unfinished is left under the output's name")
        return INTERRUPTED
    except BrokenPipeError:  # of `| head`, which has read enough: nobody is left to be told
        silence()
        return FAILED
    except UserError as error:
        tell(str(error))
        return BAD_INPUT
    except Exception as error:
        if options.debug:
            raise
        tell(f"failed: {type(error).__name__}: {error} (--debug shows where)")
        return FAILED


def run_train(options: argparse.Namespace) -> int:
    """The command `train`."""
    output = train(options.recipe, pick_device(options.device))
    if os.environ.get("RANK", "0") == "0":
        tell(f"wrote {output}")
    return DONE


def run_evaluate(options: argparse.Namespace) -> int:
    """The command `evaluate`: the table goes to standard output."""
    pairs = clip_pairs(options.result, options.truth)
    for path in filter(None, (options.csv, options.json)):
        if not path.parent.is_dir():
            raise UserError(f"{path} cannot be written because {path.parent} is not a folder; create it first")
    model = build_model(options.weights, options.device)
    evaluator = Evaluator(model.device, model.flow, options.weights_dir)
    with tqdm(unit="frame") as bar:

        def progress(clip: str, done: int, total: int | None) -> None:
            bar.set_description(clip)
            bar.update()

        report = evaluate(
            evaluator,
            pairs,
            model.provenance.get("flow", "unknown"),
            progress,
            options.allow_truncated,
            options.allow_hdr,
        )
    for notice in report.notices:
        tell(f"note: {notice}")
    for path, text in ((options.csv, as_csv), (options.json, as_json)):
        if path:
            with replacing(path) as part:
                part.write_text(text(report))
    print(table(report))
    return DONE


def run_compare(options: argparse.Namespace) -> int:
    """The command `compare`."""
    paths = [options.low_res, *options.results, *([options.gt] if options.gt else [])]
    check_page(options.output, paths, options.force)
    settings = Settings(
        crops=tuple(options.crop) if options.crop else None,
        profile=options.profile,
        flow_frames=options.flow_frames,
        metrics_frames=options.metrics_frames,
        part=options.frames,
        crf=options.crf,
        allow_truncated=options.allow_truncated,
        allow_hdr=options.allow_hdr,
    )
    with tqdm(unit="frame", delay=0.1) as bar:  # no empty bar above a sentence about bad input

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = compare_page(
            dict(zip(labels(options.results), options.results, strict=True)),
            options.output,
            lr=options.low_res,
            truth=options.gt,
            model=None if options.no_flow else lambda: build_model(options.weights, options.device),
            settings=settings,
            about={"made by": f"stablevsr {__version__}", "weights": str(options.weights or "bundled")},
            force=options.force,
            progress=progress,
        )
    for notice in found.notices:
        tell(f"note: {notice}")
    tell(f"wrote {options.output}: {found.frame_count} frames of {', '.join(found.labels)}")
    return DONE


@dataclass(frozen=True)
class Task:
    """One clip to upscale, and what became of it."""

    input: Path
    output: Path
    frames: int = 0
    seconds: float = 0.0
    error: str = ""


def run_upscale(options: argparse.Namespace) -> int:
    """The command `upscale`: input and output are looked at before the weights are loaded, once for all inputs."""
    tasks, done, model = upscale_tasks(options), [], None
    for task in tasks:
        fatal = len(tasks) == 1 or options.debug
        try:
            for path in filter(None, (task.output, options.side_by_side)):
                restore(path)
                check_output(path, task.input, options.force)
            with open_clip(task.input, options) as clip:
                if model is None:
                    fatal = True  # what is wrong with the weights or the device is wrong for all inputs
                    model = load(options)
                    digest = cache(partial(hash_weights, model))  # once for all inputs
                    fatal = len(tasks) == 1 or options.debug
                done.append(upscale_one(model, digest, clip, task, options))
        except BrokenPipeError:
            raise
        except Exception as error:
            done.append(replace(task, error=str(error) or type(error).__name__))
            if fatal:
                print_summary(done, options)
                raise
            tell(done[-1].error)
    print_summary(done, options)
    return FAILED if any(task.error for task in done) else DONE


def load(options: argparse.Namespace) -> StableVSR:
    """The model that the options ask for; prints what its weights say of themselves."""
    model = build_model(options.weights, options.device, options.dtype, options.compile, options.offload)
    for notice in untrained_parts(model.provenance):
        tell(f"note: {notice}")
    return model


def upscale_tasks(options: argparse.Namespace) -> list[Task]:
    """What the paths on the command line mean."""
    paths, output = options.paths, options.output
    if output is None:
        if len(paths) != 2:
            raise UserError(f"got {len(paths)} paths, expected IN OUT, or inputs and -o OUT")
        tasks = [Task(*paths)]
    elif len(paths) == 1 and not output.is_dir():
        tasks = [Task(paths[0], output)]
    else:
        if not output.is_dir():
            raise UserError(f"{output} is not a folder, which several inputs need: make it first")
        tasks = [Task(path, output_for(path, output)) for path in paths]
        names = [task.output.name for task in tasks]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"two inputs would both become {output / twice[0]}: rename one, or upscale it by itself")
    pair = options.side_by_side
    if pair and len(tasks) > 1:
        raise UserError("--side-by-side is for one input, got several")
    if pair and pair.resolve() == tasks[0].output.resolve():
        raise UserError(f"{pair} is named twice: give --side-by-side a file of its own")
    return tasks


@contextmanager
def open_clip(path: Path, options: argparse.Namespace) -> Iterator[Reader]:
    """Open the input, optionally a frame range, and print its notices."""
    with open_reader(path, options.allow_truncated, options.allow_hdr) as clip:
        part = clip if options.frames == (0, None) else PartReader(clip, *options.frames)
        for notice in part.notices:
            tell(f"note: {notice}")
        yield part


def upscale_one(
    model: StableVSR, digest: Callable[[], str], clip: Reader, task: Task, options: argparse.Namespace
) -> Task:
    """Run one task; returns it with what it took."""
    settings = sampling_settings(options)
    tell(
        f"{task.input} ({clip.width}x{clip.height}) to {task.output} ({4 * clip.width}x{4 * clip.height}), "
        f"{settings['steps']} steps on {model.device}, {options.dtype or 'fp32'}"
    )
    start = time.monotonic()
    with ProgressBars() as bars, pointing_to(workspace_path(task.output)):
        count = upscale(
            model,
            clip,
            task.output,
            seed=options.seed,
            tile=options.tile,
            scene_cuts=not options.no_scene_cuts,
            color_fix=options.color_fix,
            side_by_side=options.side_by_side,
            encoding=Encoding(options.codec, options.crf),
            force=options.force,
            restart=options.restart,
            keep_workspace=options.keep_workspace,
            weights=digest,
            progress=bars,
            tell=bars.tell,
            **settings,
            eta=options.eta,
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            guidance_scale=options.guidance_scale,
            conditioning_scale=options.conditioning_scale,
            noise_level=options.noise_level,
        )
    seconds = time.monotonic() - start
    tell(f"wrote {task.output}: {count} frames in {seconds:.0f} s")
    return replace(task, frames=count, seconds=round(seconds, 3))


def sampling_settings(options: argparse.Namespace) -> dict[str, object]:
    """Steps, sampler and guidance: the preset's, unless an option overrides them."""
    preset = PRESETS[options.preset]
    asked = {name: getattr(options, name) for name in ("steps", "sampler") if getattr(options, name) is not None}
    fields = {
        "every": options.guide_every,
        "first_step": options.guide_from,
        "tiny": options.guide_tiny,
        "half_size": options.guide_half,
        "half_flow": options.flow_half,
    }
    guidance = replace(preset["guidance"], **{name: value for name, value in fields.items() if value is not None})
    return preset | asked | {"guidance": guidance}


def print_summary(done: list[Task], options: argparse.Namespace) -> None:
    """A table of several tasks for the person, JSON for the machine."""
    if len(done) > 1:
        for task in done:
            tell(
                f"{task.input}: " + (f"FAILED: {task.error}" if task.error else f"{task.frames} frames, {task.output}")
            )
    if options.json:
        print(json.dumps([asdict(task) for task in done], default=str, indent=1))


def untrained_parts(provenance: dict[str, str]) -> list[str]:
    """What the weights say of themselves that the user should know before waiting for pictures."""
    if "note" in provenance:
        return [provenance["note"]]
    return [f"{part} is {origin}" for part, origin in provenance.items() if origin.startswith("untrained")]


class ProgressBars:
    """One bar for each phase of a run, with the time that is left."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self.bar: tqdm | None = None

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self.phase:
            self.__exit__()
            self.phase = progress.phase
            before = progress.done - 1  # more than 0 where an unfinished run goes on
            self.bar = tqdm(total=progress.total, initial=before, desc=progress.phase, unit=UNITS[progress.phase])
        assert self.bar is not None
        self.bar.total = progress.total
        self.bar.update(progress.done - self.bar.n)

    def tell(self, sentence: str) -> None:
        """A line between the bars."""
        self.__exit__()
        self.phase = None
        tell(sentence)


@contextmanager
def pointing_to(workspace: Path) -> Iterator[None]:
    """Say, when a run is interrupted, how to go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        if workspace.exists():
            tell(f"run the same command again to go on, or delete {workspace}")
        raise


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there signals may be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(sentence: str) -> None:
    """One line to the person, beside whatever a pipe carries."""
    print(f"stablevsr: {sentence}", file=sys.stderr)


def silence() -> None:
    """Write to nowhere from here on, so that Python does not fail once more when it flushes at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


COMMANDS = {"upscale": run_upscale, "evaluate": run_evaluate, "compare": run_compare, "train": run_train}
