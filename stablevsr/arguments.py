"""What the `stablevsr` command takes: its arguments, and how their texts are read."""

import argparse
from pathlib import Path

from stablevsr import __version__
from stablevsr.evaluation.places import Crop
from stablevsr.media import CODECS
from stablevsr.model import DTYPES
from stablevsr.sampling.colour_fix import COLOUR_FIXES
from stablevsr.sampling.presets import PRESETS
from stablevsr.sampling.samplers import SAMPLERS


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="stablevsr", description="StableVSR video super-resolution.")
    parser.add_argument("--version", action="version", version=f"stablevsr {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
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


def for_clips_that_are_read() -> argparse.ArgumentParser:
    """The arguments of commands that read videos."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--allow-truncated", action="store_true", help="take a video that ends early for as long as it lasts"
    )
    shared.add_argument("--allow-hdr", action="store_true", help="take HDR video, though its colours will look flat")
    return shared


def add_train(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "train",
        parents=[for_every_command()],
        help="train one part of a model by a recipe",
        description="Train one part of a model by a recipe. A run that was stopped goes on from its checkpoint.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, see recipes/")


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "evaluate",
        parents=[for_clips_that_are_read(), for_every_command()],
        help="measure results against the truth",
        description="Measure results against the truth: PSNR, SSIM, tOF, and HaarPSI, GMSD, LPIPS, DISTS, tLP where "
        "their packages (the extra `metrics`) and weights are there. Nothing is fetched.",
    )
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
        parents=[for_clips_that_are_read(), for_every_command()],
        help="put results side by side on an HTML page",
        description="Put results, and LR enlarged by bicubic interpolation, side by side on one HTML page that needs "
        "no network: a slider over the video, crops, temporal profile, flow and warping errors, and with --gt metrics.",
    )
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
        parents=[for_clips_that_are_read(), for_every_command()],
        help="make a video or a folder of images four times as large",
        description="Make a video or a folder of images four times as large. Frame times and audio come through.",
    )
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
        help="exact: 50 steps, as published (the default); balanced: 20; fast: 10 with --guide-tiny --flow-half; "
        "individual options override the preset",
    )
    command.add_argument("--steps", type=int, help="denoising steps (default: the preset's; exact has 50)")
    command.add_argument("--sampler", choices=SAMPLERS, help="ddpm as published, others for fewer steps")
    command.add_argument("--eta", type=float, default=0.0, help="how much noise --sampler ddim adds, 0 to 1")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, help="of the networks (default: fp32)")
    command.add_argument("--compile", action="store_true", help="compile the networks: faster after a slow start")
    command.add_argument(
        "--offload", action="store_true", help="keep on the GPU only the network at work: less memory, slower"
    )
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
        "--guide-every", type=int, metavar="K", help="apply temporal guidance every K steps (default: 1)"
    )
    command.add_argument(
        "--guide-from", type=int, metavar="STEP", help="no temporal guidance before this step, counted from 0"
    )
    command.add_argument(
        "--guide-tiny",
        action=argparse.BooleanOptionalAction,
        help="decode guidance frames with the tiny decoder (TAESD)",
    )
    command.add_argument(
        "--guide-half", action=argparse.BooleanOptionalAction, help="decode guidance frames at half size"
    )
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
