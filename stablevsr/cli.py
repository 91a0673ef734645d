"""The `stablevsr` command: arguments in, sentences out. The work is done elsewhere."""

import argparse
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from stablevsr import __version__
from stablevsr.atomic import replacing
from stablevsr.errors import UserError
from stablevsr.evaluation.clips import labels
from stablevsr.evaluation.collect import Settings
from stablevsr.evaluation.compare import check_page, compare_page
from stablevsr.evaluation.evaluate import Evaluator, clip_pairs, evaluate
from stablevsr.evaluation.places import Crop
from stablevsr.evaluation.report import as_csv, as_json, table
from stablevsr.jobs.upscale import upscale
from stablevsr.jobs.workspace import workspace_path
from stablevsr.media import CODECS, Encoding, PartReader, Reader, check_output, open_reader, output_for
from stablevsr.model import DTYPES, StableVSR, build_model, pick_device
from stablevsr.sampling.colour_fix import COLOUR_FIXES
from stablevsr.sampling.presets import PRESETS
from stablevsr.sampling.samplers import SAMPLERS
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
            return options.run(options)
    except KeyboardInterrupt:
        tell("interrupted; nothing unfinished is left under the output's name")
        return INTERRUPTED
    except UserError as error:
        tell(str(error))
        return BAD_INPUT
    except Exception as error:
        if options.debug:
            raise
        tell(f"failed: {type(error).__name__}: {error} (--debug shows where)")
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="stablevsr", description="StableVSR video super-resolution.")
    parser.add_argument("--version", action="version", version=f"stablevsr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    add_upscale(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_train(commands)
    return parser


def for_every_command() -> argparse.ArgumentParser:
    """The arguments that all commands share."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    return shared


def add_train(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "train",
        parents=[for_every_command()],
        help="train one part of a model by a recipe",
        description="Train one part of a model by a recipe. A run that was stopped goes on from its checkpoint.",
    )
    command.set_defaults(run=run_train)
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, see recipes/")


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "evaluate",
        parents=[for_every_command()],
        help="measure results against the truth",
        description="Measure results against the truth: PSNR, SSIM, tOF, and HaarPSI, GMSD, LPIPS, DISTS, tLP where "
        "their packages (the extra `metrics`) and weights are there. Nothing is fetched.",
    )
    command.set_defaults(run=run_evaluate)
    command.add_argument("result", type=Path, metavar="SR", help="a clip, or a folder of clips")
    command.add_argument("truth", type=Path, metavar="GT", help="the true clip, or a folder of clips of the same names")
    command.add_argument("--weights", type=Path, metavar="FILE", help="whose flow network tOF uses (default: bundled)")
    command.add_argument(
        "--weights-dir",
        type=Path,
        metavar="DIR",
        help="where backbones lie, as DIR/checkpoints/FILE (default: torch's cache)",
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="write a line for every frame")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything")


def add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        parents=[for_every_command()],
        help="put results side by side on an HTML page",
        description="Put results, and LR enlarged by bicubic interpolation, side by side on one HTML page that needs "
        "no network: a slider over the video, crops, temporal profile, flow and warping errors, and with --gt metrics.",
    )
    command.set_defaults(run=run_compare)
    command.add_argument("low_res", type=Path, metavar="LR", help="what was upscaled")
    command.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="clips four times as large")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page, ending in .html")
    command.add_argument("--gt", type=Path, metavar="GT", help="the true clip; with it, metrics are measured")
    command.add_argument(
        "--frames",
        type=frame_range,
        default=(0, None),
        metavar="A:B",
        help="only frames A to B - 1 of LR and GT, and of results that are longer than this",
    )
    command.add_argument(
        "--crop",
        type=crop_place,
        action="append",
        metavar="X,Y,SIZE[@FRAME]",
        help="show this square, in pixels of the results (default: where the versions differ most; FRAME: the middle)",
    )
    command.add_argument(
        "--profile",
        default="middle",
        metavar="row:Y|column:X",
        help="line of the temporal profile (default: middle row)",
    )
    command.add_argument(
        "--flow-frames",
        type=frame_list,
        metavar="I,J,...",
        help="show the motion from each of these frames to the next (default: the middle one)",
    )
    command.add_argument("--no-flow", action="store_true", help="no flow, no warping errors, no tOF: much faster")
    command.add_argument(
        "--metrics-frames",
        type=int,
        default=300,
        metavar="N",
        help="measure at most N frames, evenly chosen; 0: none (default: %(default)s)",
    )
    command.add_argument("--crf", type=int, default=16, help="quality of the video: 0 is best (default: %(default)s)")
    command.add_argument("--weights", type=Path, metavar="FILE", help="whose flow network is used (default: bundled)")
    command.add_argument("--force", action="store_true", help="replace the page if it exists")


def add_upscale(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "upscale",
        parents=[for_every_command()],
        help="make a video or a folder of images four times as large",
        description="Make a video or a folder of images four times as large. Frame times and audio come through.",
    )
    command.set_defaults(run=run_upscale)
    command.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="IN OUT: what to read (a video, a folder of images, one image) and what to write; or with -o, inputs only",
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="the output; for several inputs a folder")
    command.add_argument(
        "--frames", type=frame_range, default=(0, None), metavar="A:B", help="only frames A to B - 1, counted from 0"
    )
    command.add_argument("--weights", type=Path, metavar="FILE", help="a weights file (default: the bundled one)")
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="exact",
        help="exact: as published; balanced, fast: fewer steps and less guidance; what is given beside it counts",
    )
    command.add_argument("--steps", type=int, help="noise levels to visit (default: the preset's; exact has 50)")
    command.add_argument("--sampler", choices=SAMPLERS, help="ddpm as published, others for fewer steps")
    command.add_argument("--eta", type=float, default=0.0, help="how much noise --sampler ddim adds, 0 to 1")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, help="of the networks (default: fp32)")
    command.add_argument("--compile", action="store_true", help="compile the networks: faster behind a slow start")
    command.add_argument("--prompt", help="what the picture shows (default: the empty prompt)")
    command.add_argument("--negative-prompt", help="what it shall not show; with --guidance-scale")
    command.add_argument(
        "--guidance-scale", type=float, default=1.0, help="classifier-free guidance; above 1 it costs twice the time"
    )
    command.add_argument(
        "--conditioning-scale", type=float, default=1.0, help="weight of the neighbouring frame (default: %(default)s)"
    )
    command.add_argument("--noise-level", type=int, help="of the frames, for stock SD x4 weights only (default: 20)")
    command.add_argument(
        "--guide-every", type=int, metavar="K", help="look at the neighbouring frame in one of K steps (default: 1)"
    )
    command.add_argument("--guide-from", type=int, metavar="STEP", help="and not before this step, counted from 0")
    command.add_argument(
        "--guide-tiny", action=argparse.BooleanOptionalAction, help="look at it decoded by the weights' tiny decoder"
    )
    command.add_argument("--guide-half", action=argparse.BooleanOptionalAction, help="look at it decoded at half size")
    command.add_argument("--flow-half", action=argparse.BooleanOptionalAction, help="estimate flow at half size")
    command.add_argument(
        "--side-by-side",
        type=Path,
        metavar="FILE",
        help="a second output: bicubic interpolation left, the result right",
    )
    command.add_argument(
        "--color-fix", choices=COLOUR_FIXES, help="draw the colours back to those of the input (default: leave them)"
    )
    command.add_argument("--codec", choices=CODECS, help="of a video (default: vp9 for .webm, else h264)")
    command.add_argument("--crf", type=int, help="quality of a video: 0 is best (default: hardly any loss)")
    command.add_argument(
        "--tile",
        type=tile_size,
        default="auto",
        metavar="auto|off|N",
        help="decode in overlapping tiles of N LR pixels to save memory; auto: once memory has run out (the default)",
    )
    command.add_argument(
        "--no-scene-cuts", action="store_true", help="do not look for cuts; fetch detail across them, as published"
    )
    command.add_argument("--force", action="store_true", help="replace the output if it exists")
    command.add_argument("--restart", action="store_true", help="start again, even if an unfinished run could go on")
    command.add_argument(
        "--keep-workspace", action="store_true", help="leave OUT.unfinished, the folder of the run, where it is"
    )
    command.add_argument(
        "--allow-truncated", action="store_true", help="take a video that ends early for as long as it lasts"
    )
    command.add_argument("--allow-hdr", action="store_true", help="take HDR video, though its colours will look flat")
    command.add_argument("--json", action="store_true", help="print what was done to standard output, as JSON")


def frame_range(text: str) -> tuple[int, int | None]:
    """What --frames takes: "10:20", "10:" or ":20"."""
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdigit() for part in (first, last) if part):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected A:B, as in 0:100")
    return int(first or 0), int(last) if last else None


def frame_list(text: str) -> tuple[int, ...]:
    """What --flow-frames takes: "3,10"."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of frames, as in 3,10")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def crop_place(text: str) -> Crop:
    """What --crop takes: "100,60,64" or "100,60,64@12"."""
    place, at, frame = text.partition("@")
    numbers = place.split(",")
    if len(numbers) != 3 or not all(part.isdecimal() for part in (*numbers, *([frame] if at else []))):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected X,Y,SIZE or X,Y,SIZE@FRAME, as in 100,60,64@12")
    return Crop(*map(int, numbers), int(frame) if at else None)


def tile_size(text: str) -> int | str:
    """What --tile takes; whether the number makes sense is for the decoder to say."""
    return int(text) if text.lstrip("-").isdigit() else text


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

        report = evaluate(evaluator, pairs, model.provenance.get("flow", "unknown"), progress)
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
        try:
            for path in filter(None, (task.output, options.side_by_side)):
                check_output(path, task.input, options.force)
            with open_clip(task.input, options) as clip:
                if model is None:
                    model = build_model(options.weights, options.device, options.dtype, options.compile)
                    for notice in untrained_parts(model.provenance):
                        tell(f"note: {notice}")
                done.append(upscale_one(model, clip, task, options))
        except Exception as error:
            done.append(replace(task, error=str(error) or type(error).__name__))
            if len(tasks) == 1 or options.debug:
                print_summary(done, options)
                raise
            tell(done[-1].error)
    print_summary(done, options)
    return FAILED if any(task.error for task in done) else DONE


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
    """The input, or the part of it that is wanted; tells what is to be known of it."""
    with open_reader(path, options.allow_truncated, options.allow_hdr) as clip:
        part = clip if options.frames == (0, None) else PartReader(clip, *options.frames)
        for notice in part.notices:
            tell(f"note: {notice}")
        yield part


def upscale_one(model: StableVSR, clip: Reader, task: Task, options: argparse.Namespace) -> Task:
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
    """Steps, sampler and guidance: the preset's, but for what was asked for."""
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
