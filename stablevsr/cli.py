"""The `stablevsr` command: arguments in, sentences out. The work is done elsewhere."""

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from stablevsr import __version__
from stablevsr.errors import UserError
from stablevsr.jobs.upscale import upscale
from stablevsr.jobs.workspace import workspace_path
from stablevsr.media import check_output, open_reader
from stablevsr.model import DTYPES, build_model, pick_device
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
    add_train(commands)
    return parser


def add_train(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "train",
        help="train one part of a model by a recipe",
        description="Train one part of a model by a recipe. A run that was stopped goes on from its checkpoint.",
    )
    command.set_defaults(run=run_train)
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, see recipes/")
    command.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    command.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")


def add_upscale(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "upscale",
        help="make a video or a folder of images four times as large",
        description="Make a video or a folder of images four times as large. Frame times and audio come through.",
    )
    command.set_defaults(run=run_upscale)
    command.add_argument("input", type=Path, metavar="IN", help="a video, a folder of images, or one image")
    command.add_argument("output", type=Path, metavar="OUT", help="a video (.mp4, .mkv, ...), a folder, or one image")
    command.add_argument("--weights", type=Path, metavar="FILE", help="a weights file (default: the bundled one)")
    command.add_argument("--steps", type=int, default=50, help="noise levels to visit (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
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
    command.add_argument(
        "--noise-level", type=int, default=20, help="of the frames, for stock SD x4 weights (default: %(default)s)"
    )
    command.add_argument(
        "--side-by-side",
        type=Path,
        metavar="FILE",
        help="a second output: bicubic interpolation left, the result right",
    )
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
    command.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")


def tile_size(text: str) -> int | str:
    """What --tile takes; whether the number makes sense is for the decoder to say."""
    return int(text) if text.lstrip("-").isdigit() else text


def run_train(options: argparse.Namespace) -> int:
    """The command `train`."""
    output = train(options.recipe, pick_device(options.device))
    if os.environ.get("RANK", "0") == "0":
        tell(f"wrote {output}")
    return DONE


def run_upscale(options: argparse.Namespace) -> int:
    """The command `upscale`: input and output are looked at before the weights are loaded."""
    for path in filter(None, (options.output, options.side_by_side)):
        check_output(path, options.input, options.force)
    if options.side_by_side and options.side_by_side.resolve() == options.output.resolve():
        raise UserError(f"{options.output} is named twice: give --side-by-side a file of its own")
    with open_reader(options.input, options.allow_truncated) as clip:
        for notice in clip.notices:
            tell(f"note: {notice}")
        model = build_model(options.weights, options.device, options.dtype, options.compile)
        for notice in untrained_parts(model.provenance):
            tell(f"note: {notice}")
        tell(
            f"{options.input} ({clip.width}x{clip.height}) to {options.output} ({4 * clip.width}x{4 * clip.height}), "
            f"{options.steps} steps on {model.device}, {options.dtype or 'fp32'}"
        )
        start = time.monotonic()
        with ProgressBars() as bars, pointing_to(workspace_path(options.output)):
            count = upscale(
                model,
                clip,
                options.output,
                seed=options.seed,
                tile=options.tile,
                scene_cuts=not options.no_scene_cuts,
                side_by_side=options.side_by_side,
                force=options.force,
                restart=options.restart,
                keep_workspace=options.keep_workspace,
                progress=bars,
                tell=bars.tell,
                steps=options.steps,
                prompt=options.prompt,
                negative_prompt=options.negative_prompt,
                guidance_scale=options.guidance_scale,
                conditioning_scale=options.conditioning_scale,
                noise_level=options.noise_level,
            )
    tell(f"wrote {options.output}: {count} frames in {time.monotonic() - start:.0f} s")
    return DONE


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
