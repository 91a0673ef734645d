"""The command `convert`, which is also `tools/convert_weights.py`."""

import argparse
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from stablevsr.cli.console import DONE, require_folder_of
from stablevsr.cli.weights import asking
from stablevsr.convert.assemble import Sources, convert, describe, to_diffusers
from stablevsr.errors import OptionsError
from stablevsr.hub.cache import weights_file
from stablevsr.hub.fetch import make_place, published
from stablevsr.hub.names import Name, parse_name
from stablevsr.model import DTYPES, find_weights

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    if options.inspect:
        print(describe(find_weights(options.inspect, asking(options.yes))))
    elif options.to_diffusers:
        folder = Path(options.to_diffusers[0])
        file = find_weights(options.to_diffusers[1], asking(options.yes))
        print(f"{folder}: wrote {', '.join(to_diffusers(file, folder))} (the flow network is not part of this layout)")
    else:
        _convert(options)
    return DONE


def _convert(options: argparse.Namespace) -> None:
    name = _name(options)
    output: Path | None = options.output or (weights_file(name) if name else None)
    if output is None:
        raise OptionsError("got no output file: pass one with -o FILE")
    if output.exists() and not options.force:
        raise OptionsError(f"{output} exists already: choose another name, or pass --force to overwrite it")
    if options.output:
        require_folder_of(output)
    if options.stablevsr and options.tcm is None and not (options.stablevsr / "controlnet").is_dir():
        raise OptionsError(f"{options.stablevsr} has no controlnet folder: for a stock SD x4 upscaler use --base")
    with _sources(options, name) as sources:
        if not options.output:
            make_place(output)
        more = {"tcm": options.tcm, "tiny": options.tiny, "tokenizer": options.tokenizer}
        sources = replace(sources, **more, with_text=options.with_text)
        header = convert(sources, output, DTYPES.get(options.dtype), notify=lambda note: log.warning("%s", note))
    print(describe(output))
    if header.config.flow is None:
        print("no flow network: this file upscales single frames only; convert with --flow for clips")


def _name(options: argparse.Namespace) -> Name | None:
    """The model on the hub, if one is to be converted."""
    if options.name is None:
        return None
    name = parse_name(options.name)
    if name is None:
        raise OptionsError(f"got {options.name}, expected hub:OWNER/NAME: pass files with --stablevsr or --base")
    return name


def _sources(options: argparse.Namespace, name: Name | None) -> AbstractContextManager[Sources]:
    if name is not None:
        return published(name, options.variant, options.flow, asking(options.yes))
    base = options.stablevsr or find_weights(options.base, asking(options.yes))
    return nullcontext(Sources(base, options.flow, variant=options.variant))
