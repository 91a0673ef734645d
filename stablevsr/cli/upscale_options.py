"""The arguments of `stablevsr upscale`. Imports no PyTorch, as `parser`."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from stablevsr.cli.options import (
    add_precision,
    add_weights,
    for_clips_that_are_read,
    for_commands_that_compute,
    frame_range,
    preview_place,
)
from stablevsr.media.codecs import CODECS
from stablevsr.sampling.config import PRESETS, SIZES, SamplingConfig


def add_upscale(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "upscale",
        parents=[for_clips_that_are_read(), for_commands_that_compute()],
        help="upscale a video or a folder of images",
        description="Upscale a video or a folder of images four times, or to another size. Frame times and audio are "
        "kept.",
    )
    command.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="IN OUT: the input (a video, a folder of images, one image) and the output; with -o, inputs only; "
        "- is a pipe, for --mode streaming: yuv4mpegpipe, for the input also NUT",
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="the output; for several inputs a folder")
    command.add_argument(
        "--frames", type=frame_range, default=(0, None), metavar="A:B", help="only frames A to B - 1, counted from 0"
    )
    add_weights(command)
    add_precision(command)
    command.add_argument(
        "--side-by-side",
        type=Path,
        metavar="FILE",
        help="a second output: bicubic interpolation left, the result right",
    )
    command.add_argument(
        "--preview",
        type=preview_place,
        metavar="FRAME[:WxH+X+Y]",
        help="only upscale this frame, counted from 0, or this part of it, in pixels of the input; write before and "
        "after to OUT.preview-1.png and say how long the whole run would take",
    )
    command.add_argument("--codec", choices=CODECS, help="video codec (default: vp9 for .webm, else h264)")
    command.add_argument("--crf", type=int, help="video quality: 0 is best (default: nearly lossless)")
    command.add_argument("--force", action="store_true", help="replace the output if it exists")
    command.add_argument("--restart", action="store_true", help="start again instead of continuing an unfinished run")
    command.add_argument(
        "--keep-workspace", action="store_true", help="do not delete OUT.unfinished, the folder of the run"
    )
    command.add_argument("--json", action="store_true", help="print a summary to standard output, as JSON")
    add_machines(command)
    add_sampling(command)


def add_machines(command: argparse.ArgumentParser) -> None:
    """The arguments of a run on several GPUs or machines."""
    group = command.add_argument_group("several machines", "Scenes are sampled apart, with the same bits.")
    group.add_argument(
        "--cluster",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on the Ray cluster at this address, as in HOST:6379, or auto; without an address on the GPUs of this "
        "machine, or its cores; to be given after the paths",
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="with --cluster (default: as many as there is room for)"
    )
    group.add_argument("--cpus-per-worker", type=int, metavar="N", help="with --cluster, on CPUs (default: 1)")
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="without Ray: this is process I of N that share out the scenes through the folder of the output",
    )


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
        owner = command if name in SIZES else group
        if hint is bool:
            owner.add_argument(flag(name), action=argparse.BooleanOptionalAction, **options)
        elif choices:
            owner.add_argument(flag(name), choices=choices, **options)
        else:
            owner.add_argument(flag(name), type=reader_of(hint), metavar=field.metadata.get("metavar"), **options)


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
