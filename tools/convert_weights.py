#!/usr/bin/env python3
"""Published checkpoints to a stablevsr weights file, and back. The work is done by `stablevsr.convert`."""

import argparse
import sys
from pathlib import Path

from stablevsr.convert.assemble import Sources, convert, describe, to_diffusers
from stablevsr.errors import UserError
from stablevsr.model import DTYPES

EXAMPLES = """examples:
  the published model:     %(prog)s --stablevsr StableVSR/ --flow raft_large.pth -o stablevsr.safetensors
  for streaming:           %(prog)s --stablevsr Stream-DiffVSR/ --flow raft_large.pth -o stream.safetensors
  a stock SD x4 upscaler:  %(prog)s --base x4-upscaler-ema.safetensors --flow raft_large.pth -o base.safetensors
  your TCM on a base:      %(prog)s --base base.safetensors --tcm output/controlnet -o mine.safetensors
  back to diffusers:       %(prog)s --to-diffusers FOLDER mine.safetensors
  what is in a file:       %(prog)s --inspect mine.safetensors
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--stablevsr",
        type=Path,
        metavar="DIR",
        help="a published folder (unet, controlnet, ...), of StableVSR or Stream-DiffVSR",
    )
    source.add_argument(
        "--base",
        type=Path,
        metavar="PATH",
        help="a stock SD x4 upscaler: folder, or single file in the LDM layout; or a weights file made by this tool",
    )
    source.add_argument("--inspect", type=Path, metavar="FILE", help="print parts, parameter counts, dtype, provenance")
    source.add_argument(
        "--to-diffusers", nargs=2, type=Path, metavar=("DIR", "FILE"), help="write FILE back as a diffusers folder"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the weights file to write")
    parser.add_argument("--flow", type=Path, metavar="FILE", help="RAFT weights: torchvision's or princeton-vl's .pth")
    parser.add_argument("--tcm", type=Path, metavar="DIR", help="a controlnet folder to take the TCM from")
    parser.add_argument("--tiny", type=Path, metavar="DIR", help="taesd-x4-upscaler's folder, to decode for guidance")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="vocabulary for a base that has none (LDM)")
    parser.add_argument("--variant", help="which files of a folder to take, like fp16 (default: full precision)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors written (default: as they are)")
    parser.add_argument("--with-text", action="store_true", help="keep text encoder and vocabulary, for prompts")
    parser.add_argument("--force", action="store_true", help="overwrite the output file")
    options = parser.parse_args(arguments)
    if (options.stablevsr or options.base) and options.output is None:
        parser.error("give the file to write with -o FILE")
    return options


def run(options: argparse.Namespace) -> None:
    if options.inspect:
        print(describe(options.inspect))
        return
    if options.to_diffusers:
        folder, file = options.to_diffusers
        print(f"{folder}: wrote {', '.join(to_diffusers(file, folder))} (the flow network is not part of this layout)")
        return
    output: Path = options.output
    if output.exists() and not options.force:
        raise UserError(f"{output} exists already: give another name, or --force to overwrite it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output.parent} does not exist: make it first")
    if options.stablevsr and options.tcm is None and not (options.stablevsr / "controlnet").is_dir():
        raise UserError(f"{options.stablevsr} has no controlnet folder: for a stock SD x4 upscaler use --base")
    sources = Sources(
        base=options.stablevsr or options.base,
        flow=options.flow,
        tcm=options.tcm,
        tiny=options.tiny,
        tokenizer=options.tokenizer,
        variant=options.variant,
        with_text=options.with_text,
    )
    header = convert(sources, output, DTYPES.get(options.dtype), notify=print_note)
    print(describe(output))
    if header.config.flow is None:
        print("no flow network: this file upscales single frames only; convert with --flow for clips")


def print_note(note: str) -> None:
    """One line to the person, beside whatever a pipe carries."""
    print(f"convert_weights: note: {note}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except UserError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_weights: interrupted; no unfinished file is left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
