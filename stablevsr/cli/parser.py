"""The arguments of the `stablevsr` command. Imports no PyTorch, so that --help is fast."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from stablevsr import __version__
from stablevsr.config import DTYPE_NAMES
from stablevsr.media.codecs import CODECS
from stablevsr.sampling.config import PRESETS, SamplingConfig

CONVERT_EXAMPLES = """examples:
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
    add_evaluate(commands)
    add_compare(commands)
    add_train(commands)
    add_convert(commands)
    add_inspect(commands)
    return parser


def for_every_command() -> argparse.ArgumentParser:
    """The arguments that all commands share."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    shared.add_argument("-v", "--verbose", action="store_const", const=1, default=0, help="show more messages")
    shared.add_argument("-q", "--quiet", action="count", default=0, help="no progress (-qq: errors only)")
    return shared


def for_commands_that_compute() -> argparse.ArgumentParser:
    """The arguments of commands that run networks."""
    shared = argparse.ArgumentParser(add_help=False, parents=[for_every_command()])
    shared.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    return shared


def for_clips_that_are_read() -> argparse.ArgumentParser:
    """The arguments of commands that read videos."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--allow-truncated", action="store_true", help="accept a video that is cut short or damaged, as far as it goes"
    )
    shared.add_argument(
        "--allow-hdr",
        action="store_true",
        help="accept HDR video: the result is labeled as HDR again; stills look flat",
    )
    return shared


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "train",
        parents=[for_commands_that_compute()],
        help="train one part of a model from a recipe",
        description="Train one part of a model from a recipe. A stopped run continues from its checkpoint.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, see recipes/")


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
    command.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights with the flow network for tOF (default: bundled)"
    )
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
    command.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights with the flow network (default: bundled)"
    )
    command.add_argument("--force", action="store_true", help="replace the page if it exists")


def add_upscale(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "upscale",
        parents=[for_clips_that_are_read(), for_commands_that_compute()],
        help="upscale a video or a folder of images four times",
        description="Upscale a video or a folder of images four times. Frame times and audio are kept.",
    )
    command.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="IN OUT: the input (a video, a folder of images, one image) and the output; with -o, inputs only; "
        "- is a pipe of yuv4mpegpipe, for --mode streaming",
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="the output; for several inputs a folder")
    command.add_argument(
        "--frames", type=frame_range, default=(0, None), metavar="A:B", help="only frames A to B - 1, counted from 0"
    )
    command.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a weights file, or small or small-streaming, which are bundled (default: small)",
    )
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="precision of the networks (default: fp32)")
    command.add_argument("--compile", action="store_true", help="compile the networks: faster after a slow start")
    command.add_argument(
        "--offload", action="store_true", help="keep only the active network on the GPU: less memory, slower"
    )
    command.add_argument(
        "--side-by-side",
        type=Path,
        metavar="FILE",
        help="a second output: bicubic interpolation left, the result right",
    )
    command.add_argument("--codec", choices=CODECS, help="video codec (default: vp9 for .webm, else h264)")
    command.add_argument("--crf", type=int, help="video quality: 0 is best (default: nearly lossless)")
    command.add_argument("--force", action="store_true", help="replace the output if it exists")
    command.add_argument("--restart", action="store_true", help="start again instead of continuing an unfinished run")
    command.add_argument(
        "--keep-workspace", action="store_true", help="do not delete OUT.unfinished, the folder of the run"
    )
    command.add_argument("--json", action="store_true", help="print a summary to standard output, as JSON")
    add_sampling(command)


def add_sampling(command: argparse.ArgumentParser) -> None:
    """An option for every field of `SamplingConfig`, `--temporal-every` for the field `every` of its group `temporal`.

    Without the option the parsed value is None.
    """
    group = command.add_argument_group("sampling", "Options override the preset, or what the weights were made for.")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="exact: 50 steps, as published; balanced: 20; fast: 10, guided by the tiny decoder, with flow at half "
        "size; streaming: 4 steps per frame, past frames only, for streaming weights (default: what the weights were "
        "made for)",
    )
    for name, field, hint in sampling_fields():
        text, choices = field.metadata["help"], field.metadata.get("choices")
        options = {"dest": name, "help": text}
        if hint is bool:
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **options)
        elif choices:
            group.add_argument(flag(name), choices=choices, **options)
        else:
            group.add_argument(flag(name), type=reader_of(hint), metavar=field.metadata.get("metavar"), **options)


def flag(name: str) -> str:
    """The option of a sampling field: --temporal-every for temporal.every."""
    return "--" + name.replace(".", "-").replace("_", "-")


def sampling_fields() -> list[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Name, field and type of every sampling option; those of a group as `group.field`."""
    found = []
    hints = typing.get_type_hints(SamplingConfig)
    for field in dataclasses.fields(SamplingConfig):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = typing.get_type_hints(hint)
            found += [(f"{field.name}.{each.name}", each, inner[each.name]) for each in dataclasses.fields(hint)]
        else:
            found.append((field.name, field, hint))
    return found


def sampling_values(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, for `SamplingConfig.with_fields`."""
    values = {name: getattr(options, name) for name, _, _ in sampling_fields()}
    return {name: value for name, value in values.items() if value is not None}


def reader_of(hint: Any) -> "type | typing.Callable[[str], Any]":
    """The function that parses the text of an option of this type."""
    kinds = [kind for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))]
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    if len(kinds) == 1:
        return kinds[0]

    def read(text: str) -> Any:
        """A number, or numbers separated by commas, if the field takes them; else the text."""
        parts = text.split(",")
        if not all(part.lstrip("-").isdecimal() for part in parts):
            return text
        return int(text) if int in kinds else tuple(map(int, parts))

    return read


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
    source.add_argument("--stablevsr", type=Path, metavar="DIR", help="the published folder (unet, controlnet, ...)")
    source.add_argument(
        "--base",
        type=Path,
        metavar="PATH",
        help="a stock SD x4 upscaler: folder, or single file in the LDM layout; or a weights file made by this command",
    )
    source.add_argument("--inspect", type=Path, metavar="FILE", help="print parts, parameter counts, dtype, provenance")
    source.add_argument(
        "--to-diffusers", nargs=2, type=Path, metavar=("DIR", "FILE"), help="write FILE back as a diffusers folder"
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


def add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "inspect",
        parents=[for_every_command()],
        help="show what is in a weights file",
        description="Print the parts of a weights file, their parameter counts, dtypes and provenance, and the "
        "sampling options that the weights were made for.",
    )
    command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a weights file (default: the bundled one)")


def frame_range(text: str) -> tuple[int, int | None]:
    """Parse --frames: "10:20", "10:" or ":20"."""
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdigit() for part in (first, last) if part):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected A:B, as in 0:100")
    return int(first or 0), int(last) if last else None


def frame_list(text: str) -> tuple[int, ...]:
    """Parse --flow-frames: "3,10"."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected frame numbers, as in 3,10")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def crop_place(text: str) -> tuple[int, int, int, int | None]:
    """Parse --crop: "100,60,64" or "100,60,64@12"."""
    place, at, frame = text.partition("@")
    numbers = place.split(",")
    if len(numbers) != 3 or not all(part.isdecimal() for part in (*numbers, *([frame] if at else []))):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected X,Y,SIZE or X,Y,SIZE@FRAME, as in 100,60,64@12")
    x, y, size = map(int, numbers)
    return x, y, size, int(frame) if at else None
