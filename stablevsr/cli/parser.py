"""The arguments of the `stablevsr` command. Imports no PyTorch, so that --help is fast."""

import argparse
from pathlib import Path

from stablevsr import __version__
from stablevsr.cli.options import (
    add_precision,
    add_weights,
    add_yes,
    crop_place,
    for_clips_that_are_read,
    for_commands_that_compute,
    for_every_command,
    frame_list,
    frame_range,
)
from stablevsr.cli.upscale_options import add_upscale
from stablevsr.config import DTYPE_NAMES

CONVERT_EXAMPLES = """examples:
  by name, from the hub:   %(prog)s hub:claudiom4sir/StableVSR
  the published model:     %(prog)s --stablevsr StableVSR/ --flow raft_large.pth -o stablevsr.safetensors
  Stream-DiffVSR:          %(prog)s --stablevsr Stream-DiffVSR/ --flow raft_large.pth -o stream.safetensors
  a stock SD x4 upscaler:  %(prog)s --base x4-upscaler-ema.safetensors --flow raft_large.pth -o base.safetensors
  your TCM on a base:      %(prog)s --base base.safetensors --tcm output/controlnet -o mine.safetensors
  back to diffusers:       %(prog)s --to-diffusers FOLDER mine.safetensors
  what is in a file:       %(prog)s --inspect mine.safetensors
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="stablevsr", description="StableVSR video super-resolution.")
    parser.add_argument("--version", action="version", version=f"stablevsr {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    add_upscale(commands)
    add_app(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_train(commands)
    add_convert(commands)
    add_inspect(commands)
    add_models(commands)
    add_cache(commands)
    return parser


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "train",
        parents=[for_commands_that_compute()],
        help="train one part of a model from a recipe",
        description="Train one part of a model from a recipe. A stopped run continues from its checkpoint.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, see recipes/")


def add_app(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "app",
        parents=[for_commands_that_compute()],
        help="upscale in a web page on this machine",
        description="Serve a web page on which clips are upscaled, to this machine only. Needs the extra `app`.",
    )
    add_weights(command)
    add_precision(command)
    command.add_argument(
        "--folder",
        type=Path,
        default=Path("stablevsr-app"),
        metavar="DIR",
        help="where clips and results are kept (default: %(default)s)",
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default: this one)"
    )
    command.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    command.add_argument(
        "--max-upload", type=int, default=2000, metavar="MB", help="largest file to accept (default: %(default)s)"
    )
    command.add_argument("--open", action="store_true", help="open the page in the default browser")


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "evaluate",
        parents=[for_clips_that_are_read(), for_commands_that_compute()],
        help="measure results against the ground truth",
        description="Measure results against the ground truth: PSNR, SSIM, tOF, and HaarPSI, GMSD, LPIPS, DISTS, tLP "
        "if their packages (the extra `metrics`) and weights are installed. Nothing is downloaded.",
    )
    command.add_argument("result", type=Path, metavar="SR", help="a clip, or a folder of clips")
    command.add_argument(
        "truth", type=Path, metavar="GT", help="the ground truth, or a folder of clips of the same names"
    )
    add_weights(command, "weights with the flow network for tOF: ")
    command.add_argument(
        "--weights-dir",
        type=Path,
        metavar="DIR",
        help="folder of the backbones, as DIR/checkpoints/FILE (default: torch's cache)",
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the metrics of every frame")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all results")


def add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "compare",
        parents=[for_clips_that_are_read(), for_commands_that_compute()],
        help="put results side by side on an HTML page",
        description="Put results, and LR enlarged by bicubic interpolation, side by side on one HTML page that needs "
        "no network: a slider over the video, crops, temporal profile, flow and warping errors, and with --gt metrics.",
    )
    command.add_argument("low_res", type=Path, metavar="LR", help="the clip that was upscaled")
    command.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="clips four times as large")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page, ending in .html")
    command.add_argument("--gt", type=Path, metavar="GT", help="the ground truth; adds metrics to the page")
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
    add_weights(command, "weights with the flow network: ")
    command.add_argument("--force", action="store_true", help="replace the page if it exists")


def add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "convert",
        parents=[for_every_command()],
        help="convert published checkpoints to a weights file, and back",
        description="Convert published checkpoints to a stablevsr weights file, and back.",
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "name",
        nargs="?",
        metavar="hub:NAME",
        help="a model on the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION; without -o it is kept in the cache",
    )
    source.add_argument("--stablevsr", type=Path, metavar="DIR", help="the published folder (unet, controlnet, ...)")
    source.add_argument(
        "--base",
        metavar="PATH|NAME",
        help="a stock SD x4 upscaler: folder, or single file in the LDM layout; or a weights file made by this "
        "command, or the name of one, as for upscale",
    )
    source.add_argument("--inspect", metavar="FILE|NAME", help="print parts, parameter counts, dtype, provenance")
    source.add_argument(
        "--to-diffusers",
        nargs=2,
        metavar=("DIR", "FILE|NAME"),
        help="write a weights file back as a diffusers folder",
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="the weights file to write")
    command.add_argument("--flow", type=Path, metavar="FILE", help="RAFT weights: torchvision's or princeton-vl's .pth")
    command.add_argument("--tcm", type=Path, metavar="DIR", help="a controlnet folder to take the TCM from")
    command.add_argument(
        "--tiny", type=Path, metavar="DIR", help="the taesd-x4-upscaler folder, to decode guidance frames"
    )
    command.add_argument("--tokenizer", type=Path, metavar="DIR", help="vocabulary for a base that has none (LDM)")
    command.add_argument("--variant", help="variant of the files in a folder, such as fp16 (default: full precision)")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="of the tensors written (default: unchanged)")
    command.add_argument("--with-text", action="store_true", help="keep text encoder and vocabulary, for prompts")
    command.add_argument("--force", action="store_true", help="overwrite the output file")
    add_yes(command)


def add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "inspect",
        parents=[for_every_command()],
        help="show what is in a weights file",
        description="Print the parts of a weights file, their parameter counts, dtypes and provenance, and the "
        "sampling options that the weights were made for.",
    )
    command.add_argument(
        "file",
        nargs="?",
        metavar="FILE|NAME",
        help="a weights file, or the name of one, as for upscale (default: small, bundled)",
    )
    add_yes(command)


def add_models(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    commands.add_parser(
        "models",
        parents=[for_every_command()],
        help="list known weights and what they are for",
        description="List the published weights that --weights takes by name, and what they are for.",
    )


def add_cache(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "cache",
        parents=[for_every_command()],
        help="list or delete downloaded weights",
        description="List the weights that were downloaded by name and converted, or delete them.",
    )
    command.add_argument(
        "--clear", nargs="*", metavar="NAME", help="delete those of these names; without names, everything"
    )
