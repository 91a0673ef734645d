"""The command `convert`, which is also `tools/convert_weights.py`."""

import argparse
import logging
from pathlib import Path

from stablevsr.cli.console import DONE, require_folder_of
from stablevsr.convert.assemble import Sources, convert, describe, to_diffusers
from stablevsr.errors import OptionsError
from stablevsr.model import DTYPES

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    if options.inspect:
        print(describe(options.inspect))
    elif options.to_diffusers:
        folder, file = options.to_diffusers
        print(f"{folder}: wrote {', '.join(to_diffusers(file, folder))} (the flow network is not part of this layout)")
    else:
        _convert(options)
    return DONE


def _convert(options: argparse.Namespace) -> None:
    output: Path | None = options.output
    if output is None:
        raise OptionsError("got no output file: pass one with -o FILE")
    if output.exists() and not options.force:
        raise OptionsError(f"{output} exists already: choose another name, or pass --force to overwrite it")
    require_folder_of(output)
    if options.stablevsr and options.tcm is None and not (options.stablevsr / "controlnet").is_dir():
        raise OptionsError(f"{options.stablevsr} has no controlnet folder: for a stock SD x4 upscaler use --base")
    sources = Sources(
        base=options.stablevsr or options.base,
        flow=options.flow,
        tcm=options.tcm,
        tiny=options.tiny,
        tokenizer=options.tokenizer,
        variant=options.variant,
        with_text=options.with_text,
    )
    header = convert(sources, output, DTYPES.get(options.dtype), notify=lambda note: log.warning("%s", note))
    print(describe(output))
    if header.config.flow is None:
        print("no flow network: this file upscales single frames only; convert with --flow for clips")
