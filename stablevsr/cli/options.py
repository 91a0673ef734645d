"""Arguments that several commands share, and how their text is parsed. Imports no PyTorch, as `parser`."""

import argparse
import re

from stablevsr.config import DTYPE_NAMES


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


def add_weights(command: argparse.ArgumentParser, purpose: str = "") -> None:
    """The option for a weights file or the name of one, and that for its download.

    Args:
        purpose: what the weights are for, where that is not to upscale.
    """
    command.add_argument(
        "--weights",
        metavar="FILE|NAME",
        help=f"{purpose}a weights file; small or small-streaming, which are bundled; or the name of a model on the "
        "Hugging Face hub, see stablevsr models (default: small)",
    )
    add_yes(command)


def add_precision(command: argparse.ArgumentParser) -> None:
    """The options for the numbers of the networks, and for where these are."""
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="precision of the networks (default: fp32)")
    command.add_argument("--compile", action="store_true", help="compile the networks: faster after a slow start")
    command.add_argument(
        "--offload", action="store_true", help="keep only the active network on the GPU: less memory, slower"
    )


def add_yes(command: argparse.ArgumentParser) -> None:
    """The option of commands that may download weights."""
    command.add_argument("--yes", action="store_true", help="download weights without a question")


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


def preview_place(text: str) -> tuple[int, tuple[int, int, int, int] | None]:
    """Parse --preview: "120" or "120:160x90+40+30"; a frame, and a width, height, left and top, if there is a part."""
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,6})x(\d{1,6})\+(\d{1,6})\+(\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected FRAME or FRAME:WxH+X+Y, as in 120:160x90+40+30")
    frame, *part = (None if number is None else int(number) for number in match.groups())
    assert frame is not None
    width, height, left, top = part
    if width is None or height is None or left is None or top is None:
        return frame, None
    return frame, (width, height, left, top)
